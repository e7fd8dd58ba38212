"""Messages between two processes, each on its own event loop."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from typing import Any, cast

from hogstream.scheduler.forks import cut_off, forget_in_forks, let_go_in_forks, part_loop

_LENGTH = struct.Struct("!Q")


class ChannelClosed(Exception):
    """The other end is closed, or its process has gone."""


class Channel(asyncio.Protocol):
    """One end of a socket pair: sends without waiting, and receives in order.

    Messages are pickled as for a file: a tensor is copied, and no memory is shared.

    Attributes:
        silence: For whoever waits for a sign of life to count up; anything that comes sets it to 0.
    """

    def __init__(self) -> None:
        """Made by ``open``."""
        self._loop = asyncio.get_running_loop()
        self.silence = 0
        self._bytes = bytearray()
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._lost = asyncio.Event()

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        """Takes over one end of ``socket.socketpair()``."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(cls, sock=end)
        let_go_in_forks(channel)
        return channel

    def send(self, kind: str, content: Any = None) -> None:
        """Sends a message; nothing happens if the other end has gone.

        Args:
            kind: What it is.
            content: What goes with it.

        Raises:
            Exception: Whatever its content raises when it is pickled.
        """
        self._write(pickle.dumps((kind, content)))

    def send_sign_of_life(self) -> None:
        """Sends what is never received, but seen to come."""
        self._write(b"")

    async def receive(self) -> tuple[str, Any]:
        """Waits for the next message; a wait that is cancelled loses none.

        Raises:
            ChannelClosed: If there is none to come.
            Exception: Whatever its content raises when it is unpickled.
        """
        message = await self._messages.get()
        if message is None:
            self._messages.put_nowait(None)  # for the next who asks
            raise ChannelClosed
        kind, content = pickle.loads(message)
        return kind, content

    def hang_up(self) -> None:
        """Lets the other end know that nothing more will come, after what was sent."""
        self._transport.close()

    async def close(self) -> None:
        """Closes this end, once all is sent or the other end has gone."""
        self._transport.close()
        await self._lost.wait()

    def let_go(self) -> None:
        """Leaves it, in a child of ``os.fork``, to the parent."""
        part_loop(self._loop)
        cut_off(self._transport.get_extra_info("socket").fileno())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps what bytes are written to."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def data_received(self, data: bytes) -> None:
        """Takes what has come apart into messages."""
        self.silence = 0
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                break
            if end > _LENGTH.size:
                self._messages.put_nowait(bytes(self._bytes[_LENGTH.size : end]))
            del self._bytes[:end]

    def connection_lost(self, error: Exception | None) -> None:
        """Lets those who wait know."""
        forget_in_forks(self)
        self._messages.put_nowait(None)
        self._lost.set()

    def _write(self, message: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(_LENGTH.pack(len(message)) + message)
