"""A switch of Ethernet cards that keeps each frame for a time. Run by slow_link.py, as root.

    python tools/measure/relay.py SECONDS CARD CARD...

It learns which addresses each card leads to; frames for others, and those for all, go to all.
Prints "ready" when it listens, and runs until it is ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import select
import socket
import struct
import sys
import time
from collections import deque

MTU = 9000
_EVERY_PROTOCOL, _OUTGOING, _FRAME_BYTES = 3, 4, 1 << 16
_SIOCETHTOOL = 0x8946
# Checksums, scatter-gather, and segments that the card would make: all by the sender's kernel.
_OFF = (0x17, 0x19, 0x1F, 0x24)


def disable_offloading(card: str) -> None:
    """Lets the kernel send whole frames with their checksums, as `ethtool -K CARD tx off`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in _OFF:
            value = bytearray(struct.pack("II", command, 0))
            place = (ctypes.c_char * len(value)).from_buffer(value)
            request = struct.pack("16sP", card.encode(), ctypes.addressof(place))
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def relay(delay_s: float, names: list[str]) -> None:
    """Passes frames on, `delay_s` after they have come."""
    cards = []
    for name in names:
        card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY_PROTOCOL))
        card.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 25)
        card.bind((name, 0))
        card.setblocking(False)
        cards.append(card)
    print("ready", flush=True)
    waiting: deque[tuple[float, int, bytes]] = deque()  # when it is due, whence, frame
    leads_to: dict[bytes, int] = {}
    while True:
        rest_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for card in select.select(cards, [], [], rest_s)[0]:
            frame, (_, _, kind, *_) = card.recvfrom(_FRAME_BYTES)
            if kind != _OUTGOING:  # not one of ours
                source = cards.index(card)
                leads_to[frame[6:12]] = source
                waiting.append((time.monotonic() + delay_s, source, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, source, frame = waiting.popleft()
            known = leads_to.get(frame[:6])
            for i in range(len(cards)) if known is None else (known,):
                if i != source:
                    send(cards[i], frame)


def send(card: socket.socket, frame: bytes) -> None:
    """Sends a frame, or loses it where the card is full, as a switch does."""
    try:
        card.send(frame)
    except OSError:
        return


if __name__ == "__main__":
    relay(float(sys.argv[1]), sys.argv[2:])
