// ZeroMQ's sockets in the middle of a wait, without Python. A message that native code does not deal
// with cannot be put back, so it is held here, in order, until Python takes it.
//
// libzmq is the one that pyzmq has loaded. transport/sockets.py gives the addresses of its functions;
// they are declared here as in zmq.h, which is not needed then. A part of ring.cpp.
#pragma once

#include <cerrno>
#include <deque>
#include <vector>

namespace {

constexpr int kDontWait = 1, kSendMore = 2, kEvents = 15;  // ZMQ_DONTWAIT and so on
constexpr short kPollIn = 1;

struct alignas(void*) Content {  // zmq_msg_t
  unsigned char opaque[64];
};

struct PollItem {  // zmq_pollitem_t
  void* socket;
  int descriptor;
  short events, found;
};

struct ZeroMQ {  // transport/sockets.py
  int (*msg_init)(Content*);
  int (*msg_recv)(Content*, void* socket, int flags);
  void* (*msg_data)(Content*);
  size_t (*msg_size)(const Content*);
  int (*msg_more)(const Content*);
  int (*msg_close)(Content*);
  int (*send)(void* socket, const void* data, size_t size, int flags);
  int (*getsockopt)(void* socket, int option, void* value, size_t* size);
  int (*poll)(PollItem*, int count, long timeout_ms);
};

struct Bytes {
  const uint8_t* data;
  int64_t size;
};

struct Frame {
  Content content;
  void* socket;
  bool is_last;  // of its message
};

template <class Function>
int repeat_if_interrupted(Function function) {
  int result;
  do result = function();
  while (result < 0 && errno == EINTR);
  return result;
}

class Sockets {
 public:
  Sockets(const ZeroMQ& zmq, int64_t most_messages) : zmq_(zmq), most_messages_(most_messages) {}

  ~Sockets() {
    while (!frames_.empty()) pop();
  }

  // Reads these sockets from now on.
  void use(void* const* sockets, int64_t count) {
    items_.clear();
    for (int64_t i = 0; i < count; i++) items_.push_back({sockets[i], 0, kPollIn, 0});
  }

  // Reads what has arrived and offers each message to `deal(socket, frames)`. Those that it does not
  // take, and those behind them on the same socket, are held; returns whether there are such. Until
  // Python has taken them nothing more is read.
  template <class Deal>
  bool take(Deal deal) {
    int64_t left = frames_.empty() ? most_messages_ : 0;
    for (const PollItem& item : items_) {
      bool holds = false;
      for (; left > 0 && read(item.socket); left--) {
        holds = holds || !deal(item.socket, message_);
        if (!holds) drop(message_.size());
      }
    }
    return !frames_.empty();
  }

  // Sleeps until there is something to read; returns false if a signal came, which Python must see.
  bool sleep(int64_t until_ns) {
    const int64_t left_ns = until_ns - now_ns();
    const long timeout_ms = left_ns > 0 ? (left_ns + 999'999) / 1'000'000 : 0;
    return zmq_.poll(items_.data(), static_cast<int>(items_.size()), timeout_ms) >= 0;
  }

  // Sends a message now; returns false if there is no room for it, or nobody who takes it.
  bool send(void* socket, const Bytes* frames, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const int flags = kDontWait | (i + 1 < count ? kSendMore : 0);
      const auto send_frame = [&] {
        return repeat_if_interrupted(
            [&] { return zmq_.send(socket, frames[i].data, frames[i].size, flags); });
      };
      if (send_frame() >= 0) continue;
      if (errno != EAGAIN) return false;
      int events;
      size_t size = sizeof events;
      zmq_.getsockopt(socket, kEvents, &events, &size);  // takes note of credits (zeromq.py)
      if (send_frame() < 0) return false;
    }
    return true;
  }

  Frame* oldest() { return frames_.empty() ? nullptr : &frames_.front(); }

  Bytes bytes_of(Frame& frame) {
    return {static_cast<const uint8_t*>(zmq_.msg_data(&frame.content)),
            static_cast<int64_t>(zmq_.msg_size(&frame.content))};
  }

  void pop() {
    zmq_.msg_close(&frames_.front().content);
    frames_.pop_front();
  }

 private:
  // Reads the oldest message of a socket, which comes whole or not at all; tells if there is one.
  bool read(void* socket) {
    message_.clear();
    for (bool is_last = false; !is_last;) {
      Frame& frame = frames_.emplace_back();
      frame.socket = socket;
      zmq_.msg_init(&frame.content);
      const int size = repeat_if_interrupted(
          [&] { return zmq_.msg_recv(&frame.content, socket, kDontWait); });
      if (size < 0) {
        drop(message_.size() + 1);
        return false;
      }
      is_last = frame.is_last = !zmq_.msg_more(&frame.content);
      message_.push_back(bytes_of(frame));
    }
    return true;
  }

  // Forgets the latest frames.
  void drop(size_t count) {
    for (; count > 0; count--) {
      zmq_.msg_close(&frames_.back().content);
      frames_.pop_back();
    }
  }

  const ZeroMQ zmq_;
  const int64_t most_messages_;  // read by one look
  std::vector<PollItem> items_;
  std::deque<Frame> frames_;    // that are held; what is read stays where it is
  std::vector<Bytes> message_;  // the frames of the latest one
};

struct Held {  // transport/sockets.py
  void* socket;
  const uint8_t* data;
  int64_t size, is_last;
};

}  // namespace

extern "C" {

Sockets* afd_sockets_open(const ZeroMQ* zmq, int64_t most_messages) {
  return new (std::nothrow) Sockets(*zmq, most_messages);
}

void afd_sockets_close(Sockets* sockets) { delete sockets; }

void afd_sockets_use(Sockets* sockets, void* const* handles, int64_t count) {
  sockets->use(handles, count);
}

// Tells of the oldest frame that is held, if there is one; it stays until afd_sockets_pop.
int64_t afd_sockets_peek(Sockets* sockets, Held* held) {
  Frame* frame = sockets->oldest();
  if (frame == nullptr) return 0;
  const Bytes bytes = sockets->bytes_of(*frame);
  *held = {frame->socket, bytes.data, bytes.size, frame->is_last};
  return 1;
}

void afd_sockets_pop(Sockets* sockets) { sockets->pop(); }

}  // extern "C"
