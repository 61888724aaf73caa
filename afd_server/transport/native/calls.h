// Both ends of an FFN call in the middle of a reader's wait, without Python: the server goes from
// message to kernel to message, the client from message to the memory that waits for an answer, and
// where it knows the way from there through the attention of the next layer to the next call.
//
// Only what is exactly right is dealt with here: a message of the fixed layout (transport/codec.py)
// from a known peer; for the server of a layer that is computed natively, with the rows that it
// takes; for the client the answer to a call that is out. Whatever else arrives is left in its
// ring, or held if it came over a socket, and ends the wait. A part of ring.cpp.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kFrames = 2;
constexpr int64_t kHead = 4 * (1 + kFrames);     // number of frames, their lengths
constexpr int64_t kNumber = 9;                   // a marker and 8 bytes, the highest first
constexpr uint8_t kMarker = 0xcf, kNoText = 0xa0;
constexpr int64_t kUint8 = 1, kFloat32 = 4;     // DType
constexpr int64_t kCallNumbers = 15, kAnswerNumbers = 17, kTextPlace = 10;
constexpr double kShortestWait = 1e-6;  // that is noted, in seconds
constexpr int64_t kMostHeader = 2048, kMostRecord = 4 << 20;

struct Peer {  // reached through a ring or a socket; `expected_size` is 0 if it is only watched
  Ring* ring;
  char* memory;  // where the ring's mapping begins
  void* socket;
  const uint8_t* route;           // its name, on a socket that several peers share
  const uint8_t *expected, *own;  // what its headers begin with, and those that are sent to it
  int64_t route_size, expected_size, own_size, slot;
};

struct Peers {  // transport/calls.py
  Peer* table;
  int64_t count;
  Sockets* sockets;  // null if all have rings
  uint64_t bell;     // bit i: the reader of ring i has gone to sleep and must be woken
  uint64_t left;     // bit i: the oldest record of ring i is left to Python, or the ring is of no use
};

struct Message {
  Bytes header, payload;
};

struct Layer {  // `function` is null for a layer that is not computed here
  void (*function)(const void* context, const uint8_t* rows, int64_t count, float* out);
  const void* context;
  int64_t row_bytes, width;
};

struct Event {  // telemetry/timeline.py
  double begin_s, end_s;
  uint64_t step;
  uint32_t rows, lane, kind;
  uint16_t layer, peer;
};
static_assert(sizeof(Event) == 40, "as struct.Struct('<ddQIIIHH')");
enum : uint32_t { kAttention = 1, kAToF = 4, kFToA = 5, kFFN = 6, kGathered = 7, kWait = 8 };

struct Call {
  int64_t caller, epoch, step, lane, layer, part, rows;
  double taken_s, live_since_s;
  std::vector<uint8_t> data;
};

struct Server {  // transport/calls.py
  Peers* callers;
  Layer* layers;
  Event* events;
  int64_t* sequence;
  int64_t num_layers, second_from, slot, epoch, most_rows, most_events;
  int64_t num_events, num_calls, num_rows;
  double idle_since_s, answered_s;
};

double seconds() { return now_ns() * 1e-9; }

int64_t number_at(const uint8_t* at) {
  uint64_t number;
  memcpy(&number, at + 1, 8);
  return static_cast<int64_t>(__builtin_bswap64(number));
}

uint8_t* put_number(uint8_t* at, uint64_t number) {
  *at = kMarker;
  number = __builtin_bswap64(number);
  memcpy(at + 1, &number, 8);
  return at + kNumber;
}

bool is_same(const Bytes& bytes, const uint8_t* data, int64_t size) {
  return bytes.size == size && memcmp(bytes.data, data, size) == 0;
}

// Reads the header of a message into its numbers; returns whether it is one of the peer's headers of
// this layout. `text` is the place of an empty string, if there is one.
bool read_header(const Peer& peer, const Bytes& header, int64_t count, int64_t text,
                 int64_t* numbers) {
  if (peer.expected_size == 0 || header.size != peer.expected_size + count * kNumber + (text < count))
    return false;
  if (memcmp(header.data, peer.expected, peer.expected_size) != 0) return false;
  const uint8_t* at = header.data + peer.expected_size;
  for (int64_t i = 0; i < count; i++, at += kNumber) {
    if (i == text && *at++ != kNoText) return false;
    if (*at != kMarker || (numbers[i] = number_at(at)) < 0) return false;
  }
  return true;
}

// Cuts a record into a message's frames; tells if it has two.
bool cut(const uint8_t* at, int64_t length, Message& message) {
  uint32_t head[1 + kFrames];
  if (length < kHead) return false;
  memcpy(head, at, kHead);
  const int64_t header = head[1], payload = head[2];
  message = {{at + kHead, header}, {at + kHead + header, payload}};
  return head[0] == kFrames && header + payload == length - kHead;
}

int64_t place_of(const Peers& peers, void* socket, const std::vector<Bytes>& frames) {
  for (int64_t i = 0; i < peers.count; i++) {
    const Peer& peer = peers.table[i];
    if (peer.socket == socket &&
        (peer.route == nullptr || is_same(frames[0], peer.route, peer.route_size)))
      return i;
  }
  return -1;
}

// Offers what has arrived to `deal`, with the place of its sender. What that does not take is left to
// Python, and what comes behind it on the same way; returns whether there is such.
template <class Deal>
bool take(Peers& peers, Deal deal) {
  bool others = false;
  Message message;
  for (int64_t i = 0; i < peers.count; i++) {
    const Peer& peer = peers.table[i];
    for (int64_t found; peer.ring && (found = afd_ring_peek(peer.ring)) != kNothing;) {
      const uint8_t* at = reinterpret_cast<uint8_t*>(peer.memory) + (found >> 32);
      if (found < 0 || !cut(at, found & 0xffffffff, message) || !deal(i, message)) {
        peers.left |= uint64_t{1} << i;
        others = true;
        break;
      }
      afd_ring_advance(peer.ring);
    }
  }
  if (peers.sockets == nullptr) return others;
  return peers.sockets->take([&](void* socket, const std::vector<Bytes>& frames) {
    const int64_t i = place_of(peers, socket, frames);
    if (i < 0) return false;
    const size_t route = peers.table[i].route != nullptr;
    return frames.size() == route + kFrames && deal(i, {frames[route], frames[route + 1]});
  });
}

uint8_t* put_header(uint8_t* at, const Peer& peer, const int64_t* numbers, int64_t count,
                    int64_t text) {
  memcpy(at, peer.own, peer.own_size);
  at += peer.own_size;
  for (int64_t i = 0; i < count; i++) {
    if (i == text) *at++ = kNoText;
    at = put_number(at, numbers[i]);
  }
  return at;
}

// Sends a peer a message, whether it sleeps or not, and notes if it must be woken; returns whether
// there was room for it.
bool send_to(Peers& peers, int64_t place, const int64_t* numbers, int64_t count, int64_t text,
             const void* payload, int64_t bytes) {
  const Peer& peer = peers.table[place];
  const int64_t header = peer.own_size + count * kNumber + (text < count);
  if (peer.ring == nullptr) {
    thread_local std::vector<uint8_t> buffer;
    buffer.resize(header);
    put_header(buffer.data(), peer, numbers, count, text);
    const Bytes frames[] = {{peer.route, peer.route_size},
                            {buffer.data(), header},
                            {static_cast<const uint8_t*>(payload), bytes}};
    const int64_t first = peer.route == nullptr;
    return peers.sockets->send(peer.socket, frames + first, 1 + kFrames - first);
  }
  const int64_t size = kHead + header + bytes, begin = reserve(peer.ring, size);
  if (begin < 0) return false;
  uint8_t* at = reinterpret_cast<uint8_t*>(peer.memory) + begin;
  const uint32_t head[] = {kFrames, static_cast<uint32_t>(header), static_cast<uint32_t>(bytes)};
  memcpy(at, head, kHead);
  memcpy(put_header(at + kHead, peer, numbers, count, text), payload, bytes);
  if (afd_ring_commit(peer.ring, size)) peers.bell |= uint64_t{1} << place;
  return true;
}

enum class Found { kNothing, kDone, kMore, kLeft };  // kMore: look again at once; kLeft: to Python

// Looks until something is left to Python, or the time is over. Rings are watched as in
// afd_ring_watch; with sockets it sleeps between looks. Returns whether Python has something to do.
template <class Look>
int64_t wait(const Peers& peers, int64_t until, Look look) {
  Sockets* sockets = peers.sockets;
  for (;;) {
    for (int i = 0; i < (sockets == nullptr ? kPausesBetweenYields : 1); ++i) {
      const Found found = look();
      if (found == Found::kLeft) return 1;
      if (found == Found::kDone && now_ns() >= until) return 0;
      if (found == Found::kMore)
        i = -1;
      else
        pause_briefly();
    }
    if (sockets == nullptr) sched_yield();
    if (now_ns() >= until) return 0;
    if (sockets != nullptr && !sockets->sleep(until)) return 1;
  }
}

// Reads a message if it is a call to be answered here; its rows are the payload.
bool read_call(const Server& server, const Peer& caller, const Message& message, Call& call) {
  int64_t numbers[kCallNumbers];
  if (!read_header(caller, message.header, kCallNumbers, kCallNumbers, numbers)) return false;
  // epoch, sequence, budget, then the dispatch, then dtype, rank, dimensions, bytes, CRC
  const int64_t *own = numbers + 3, *facts = numbers + 8, bytes = message.payload.size;
  call = {0, numbers[0], own[0], own[1], own[2], own[3], facts[2], 0.0, own[4] * 1e-6, {}};
  if (call.layer >= server.num_layers || call.part != server.slot) return false;
  const Layer& layer = server.layers[call.layer];
  return layer.function != nullptr && facts[0] == kUint8 && facts[1] == 2 && call.rows > 0 &&
         call.rows <= server.most_rows && facts[3] == layer.row_bytes && facts[4] == 0 &&
         facts[5] == bytes && bytes == call.rows * layer.row_bytes && facts[6] == 0 &&
         call.rows * layer.width * 4 < kMostRecord - kHead - kMostHeader;
}

// Writes the answer to a call; one that finds no room is lost, and asked for again.
void answer(Server& server, const Call& call, const float* partial, double end_s) {
  const int64_t width = server.layers[call.layer].width, bytes = call.rows * width * 4;
  const int64_t numbers[kAnswerNumbers] = {
      server.epoch, ++*server.sequence, 0,
      call.step, call.lane, call.layer, call.part, call.epoch,
      static_cast<int64_t>(call.taken_s * 1e6), static_cast<int64_t>((end_s - call.taken_s) * 1e6),
      kFloat32, 2, call.rows, width, 0, bytes, 0};
  send_to(*server.callers, call.caller, numbers, kAnswerNumbers, kTextPlace, partial, bytes);
}

// Takes the calls that can be answered here; returns whether something else has arrived.
bool take_calls(const Server& server, std::vector<Call>& calls) {
  return take(*server.callers, [&](int64_t place, const Message& message) {
    Call call;
    if (!read_call(server, server.callers->table[place], message, call)) return false;
    call.caller = place;
    call.taken_s = seconds();
    call.live_since_s = call.taken_s - call.live_since_s;
    call.data.assign(message.payload.data, message.payload.data + message.payload.size);
    calls.push_back(std::move(call));
    return true;
  });
}

void record(Server& server, uint32_t kind, double begin_s, double end_s, const Call& call,
            int64_t count) {
  const auto lane = static_cast<uint32_t>(call.lane);
  const auto layer = static_cast<uint16_t>(call.layer % server.second_from);
  const auto peer = static_cast<uint16_t>(server.callers->table[call.caller].slot);
  const auto step = static_cast<uint64_t>(call.step);
  const auto rows = static_cast<uint32_t>(count);
  if (server.num_events < server.most_events)
    server.events[server.num_events++] = {begin_s, end_s, step, rows, lane, kind, layer, peer};
}

// Answers the first call and those of the same layer that may be computed with it.
void compute(Server& server, std::vector<Call>& calls) {
  thread_local std::vector<Call> group, others;
  thread_local std::vector<uint8_t> batch;
  thread_local std::vector<float> out;
  const Layer& layer = server.layers[calls[0].layer];
  group.clear();
  others.clear();
  batch.clear();
  int64_t count = 0;
  double live_since_s = calls[0].live_since_s;
  for (Call& call : calls) {
    live_since_s = call.live_since_s < live_since_s ? call.live_since_s : live_since_s;
    if (call.layer != calls[0].layer || (count && count + call.rows > server.most_rows)) {
      others.push_back(std::move(call));
      continue;
    }
    count += call.rows;
    batch.insert(batch.end(), call.data.begin(), call.data.end());
    group.push_back(std::move(call));
  }
  out.resize(count * layer.width);
  const double begin_s = seconds();
  if (server.idle_since_s > 0) {
    const double since_s = live_since_s > server.idle_since_s ? live_since_s : server.idle_since_s;
    if (since_s < begin_s && server.num_events < server.most_events)
      server.events[server.num_events++] = {since_s, begin_s, 0, 0, 0, kWait, 0, 0};
  }
  layer.function(layer.context, batch.data(), count, out.data());
  const double end_s = seconds();
  const float* partial = out.data();
  for (size_t i = 0; i < group.size(); i++) {
    answer(server, group[i], partial, end_s);
    partial += group[i].rows * layer.width;
    if (i == 0)
      record(server, kFFN, begin_s, end_s, group[i], count);
    else
      record(server, kGathered, begin_s, end_s, group[i], group[i].rows);
  }
  server.num_calls += static_cast<int64_t>(group.size());
  server.num_rows += count;
  server.answered_s = seconds();
  server.idle_since_s = others.empty() ? server.answered_s : 0.0;
  calls.swap(others);
}

// Free; out; complete, and about to go on when it may; the call of a later layer, not sent for want
// of room.
enum : int64_t { kFree = 0, kOut = 1, kGoesOn = 2, kUnsent = 3 };

// How a micro-batch goes on from an answer (models/base.py, kernels/table.py). The attention of a
// layer makes the next residual in `hidden`, and the rows of the next call in `data`. Where the
// first half of a layer's FFN is held here it may be computed to `own`, while the call asks for the
// second one alone: its layer's number is then `second_from` higher.
//
// A micro-batch may follow another one, whose keys it sees: in each layer it waits for that one.
struct Way {
  int32_t (*function)(const void* context, const float* hidden, const float* delta, int64_t rows,
                      const void* blocks, const void* seen, float* total, uint8_t* data);
  const void *const *contexts, *const *blocks, *const *seen;  // by layer
  const int64_t* peers;  // by layer: whom to call; less than 0 if that is left to Python
  int64_t num_layers, row_bytes;
  float* hidden;
  uint8_t* data;
  double live_since_s;
  void (*first_half)(const void* context, const uint8_t* rows, int64_t count, float* out);
  const void* const* first_halves;  // contexts by layer, null where it is not held
  float* own;
  int64_t second_from;
  int64_t* attended;     // layers whose keys are written, for who follows
  const int64_t* ahead;  // `attended` of the one that goes ahead; null if it follows nobody

  bool may_attend(int64_t layer) const { return ahead == nullptr || *ahead > layer; }

  bool holds_half(int64_t layer) const {
    return first_half != nullptr && first_halves[layer] != nullptr;
  }
};

struct Out {  // a call that is out, and where its answer goes
  int64_t state, peer, epoch, step, lane, layer, part, rows, width;
  float* answer;
  const Way* way;  // null if it does not go on
  double sent_s;
  int64_t shift;        // of the layer's number; 0 if all of it was asked for
  int64_t is_answered;  // though it may not be complete
  int64_t is_own_due;   // the half that is held here has not been computed
};

struct Client {  // transport/calls.py
  Peers* peers;
  Out* outs;
  int64_t* ready;  // places of calls with which Python has to go on
  int64_t* sequence;
  Event* events;
  int64_t num_outs, num_ready, most_events, num_events;
  double idle_since_s, answered_s;
};

bool goes_on(const Out& out) {
  return out.way != nullptr && out.layer + 1 < out.way->num_layers &&
         out.way->peers[out.layer + 1] >= 0;
}

void note(Client& client, const Event& event) {
  if (client.num_events < client.most_events) client.events[client.num_events++] = event;
}

Event event_of(const Out& out, uint32_t kind, double begin_s, double end_s, int64_t peer) {
  return {begin_s, end_s > begin_s ? end_s : begin_s, static_cast<uint64_t>(out.step),
          static_cast<uint32_t>(out.rows), static_cast<uint32_t>(out.lane), kind,
          static_cast<uint16_t>(out.layer), static_cast<uint16_t>(peer)};
}

// Sends a call; returns whether there was room for it.
bool send(Client& client, Out& out, int64_t live_us, const uint8_t* data, int64_t row_bytes) {
  const int64_t bytes = out.rows * row_bytes;
  const int64_t numbers[kCallNumbers] = {
      out.epoch, ++*client.sequence, 0, out.step, out.lane, out.layer + out.shift, out.part,
      live_us, kUint8, 2, out.rows, row_bytes, 0, bytes, 0};
  out.sent_s = seconds();
  const bool is_sent =
      bytes <= kMostRecord - kHead - kMostHeader &&
      send_to(*client.peers, out.peer, numbers, kCallNumbers, kCallNumbers, data, bytes);
  out.state = is_sent ? kOut : kUnsent;
  return is_sent;
}

// Says of a call that is about to be sent what is asked for: all if this side has other work while
// it is out.
void divide(const Client& client, Out& out) {
  bool is_half = out.way != nullptr && out.way->holds_half(out.layer);
  for (int64_t i = 0; i < client.num_outs && is_half; i++)
    is_half = &client.outs[i] == &out || client.outs[i].state == kFree;
  out.shift = is_half ? out.way->second_from : 0;
  out.is_own_due = is_half;
  out.is_answered = 0;
}

// Takes note that an answer has come, or the half that is held here was computed.
void complete(Client& client, int64_t place) {
  Out& out = client.outs[place];
  if (!out.is_answered || out.is_own_due) return;
  if (out.shift != 0)
    for (int64_t i = 0; i < out.rows * out.width; i++) out.answer[i] = out.way->own[i] + out.answer[i];
  out.state = goes_on(out) ? kGoesOn : kFree;
  if (out.state == kFree) client.ready[client.num_ready++] = place;
}

// Computes one half that is due here; returns whether there was one.
bool compute_own(Client& client) {
  for (int64_t place = 0; place < client.num_outs; place++) {
    Out& out = client.outs[place];
    if (out.state != kOut || !out.is_own_due) continue;
    const Way& way = *out.way;
    const double begin_s = seconds(), since_s = client.idle_since_s;
    if (since_s > 0 && begin_s - since_s > kShortestWait)
      note(client, {since_s, begin_s, 0, 0, 0, kWait, 0, 0});
    way.first_half(way.first_halves[out.layer], way.data, out.rows, way.own);
    const double end_s = seconds();
    note(client, event_of(out, kFFN, begin_s, end_s, 0));
    out.is_own_due = 0;
    client.idle_since_s = end_s;
    complete(client, place);
    return true;
  }
  return false;
}

// Takes an answered micro-batch to its next call; Python goes on if that does not work.
void go_on(Client& client, int64_t place) {
  Out& out = client.outs[place];
  const Way& way = *out.way;
  const int64_t layer = out.layer + 1;
  const double begin_s = seconds();
  if (client.idle_since_s > 0) note(client, {client.idle_since_s, begin_s, 0, 0, 0, kWait, 0, 0});
  client.idle_since_s = 0.0;
  if (!way.function(way.contexts[layer], way.hidden, out.answer, out.rows, way.blocks[layer],
                    way.seen[layer], way.hidden, way.data)) {
    out.state = kFree;
    client.ready[client.num_ready++] = place;
    return;
  }
  *way.attended = layer + 1;
  out.layer = layer;
  out.peer = way.peers[layer];
  out.part = client.peers->table[out.peer].slot;
  divide(client, out);
  const double end_s = seconds();
  note(client, event_of(out, kAttention, begin_s, end_s, 0));
  const auto live_us = static_cast<int64_t>((end_s - way.live_since_s) * 1e6);
  if (!send(client, out, live_us, way.data, way.row_bytes))
    client.ready[client.num_ready++] = place;
}

// Takes a message if it is the answer to a call that is out.
bool take_answer(Client& client, int64_t peer, const Message& message) {
  int64_t numbers[kAnswerNumbers];
  const Peer& sender = client.peers->table[peer];
  if (!read_header(sender, message.header, kAnswerNumbers, kTextPlace, numbers)) return false;
  const int64_t *own = numbers + 3, *facts = numbers + 10, bytes = message.payload.size;
  for (int64_t i = 0; i < client.num_outs; i++) {
    Out& out = client.outs[i];
    if (out.state != kOut || out.is_answered || out.peer != peer || out.step != own[0] ||
        out.lane != own[1] || out.layer + out.shift != own[2] || out.part != own[3] || out.epoch != own[4])
      continue;
    if (facts[0] != kFloat32 || facts[1] != 2 || facts[2] != out.rows || facts[3] != out.width ||
        facts[4] != 0 || facts[5] != bytes || bytes != out.rows * out.width * 4 || facts[6] != 0)
      return false;
    memcpy(out.answer, message.payload.data, bytes);
    out.is_answered = 1;
    client.answered_s = seconds();
    // both are on one host and share the clock; that of the answer is in whole microseconds
    const double taken_s = own[5] * 1e-6, computed_s = own[6] * 1e-6 + taken_s;
    note(client, event_of(out, kAToF, out.sent_s, taken_s, sender.slot));
    note(client, event_of(out, kFToA, computed_s < client.answered_s ? computed_s : client.answered_s,
                          client.answered_s, sender.slot));
    complete(client, i);
    return true;
  }
  return false;
}

// Takes the answers; returns whether something else has arrived.
bool take_answers(Client& client) {
  return take(*client.peers, [&](int64_t place, const Message& message) {
    return take_answer(client, place, message);
  });
}

}  // namespace

extern "C" {

// Waits, and answers what it can meanwhile; returns whether something else has arrived, or somebody
// must be woken, or the events are to be taken, or there was a signal.
int64_t afd_serve(Server* server, int64_t longest_ns) {
  thread_local std::vector<Call> calls;
  const int64_t until = now_ns() + longest_ns;
  const auto must_return = [&] {
    return server->callers->bell != 0 || server->num_events > server->most_events / 2;
  };
  return wait(*server->callers, until, [&] {
    bool others = take_calls(*server, calls);
    while (!calls.empty()) {
      compute(*server, calls);
      if (!others && !must_return() && now_ns() < until) others = take_calls(*server, calls);
    }
    return others || must_return() ? Found::kLeft : Found::kNothing;
  });
}

// Sends a call and notes it at a place that is free; returns whether there was room for it.
int64_t afd_call(Client* client, int64_t place, int64_t peer, int64_t epoch, int64_t step,
                 int64_t lane, int64_t layer, int64_t part, int64_t live_us, const uint8_t* data,
                 int64_t rows, int64_t row_bytes, float* answer, int64_t width, const Way* way) {
  Out& out = client->outs[place];
  out = {kFree, peer, epoch, step, lane, layer, part, rows, width, answer, way, 0.0, 0, 0, 0};
  divide(*client, out);
  const bool is_sent = send(*client, out, live_us, data, row_bytes);
  if (!is_sent) out.state = kFree;
  return is_sent;
}

// Waits, takes answers and goes on with them; returns whether Python has to go on with one, or
// something else has arrived, or somebody must be woken, or the events are to be taken, or there was
// a signal.
int64_t afd_await(Client* client, int64_t longest_ns) {
  const int64_t until = now_ns() + longest_ns;
  return wait(*client->peers, until, [&] {
    const bool others = take_answers(*client);
    bool went_on = false;
    for (int64_t place = client->num_outs; place-- > 0;) {  // who follows has the lower place
      const Out& out = client->outs[place];
      if (out.state == kGoesOn && out.way->may_attend(out.layer + 1)) {
        go_on(*client, place);
        went_on = true;
      }
    }
    if (went_on && client->num_ready == 0) client->idle_since_s = seconds();
    if (others || client->num_ready > 0 || client->peers->bell != 0 ||
        client->num_events > client->most_events / 2)
      return Found::kLeft;
    if (compute_own(*client)) return Found::kMore;  // its answer may have come before
    return went_on ? Found::kDone : Found::kNothing;
  });
}

}  // extern "C"
