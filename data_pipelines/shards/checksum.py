"""CRC-32 of a member's bytes: the numbers of zlib, about ten times as fast by Intel's library where it is installed."""

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this platform
    from zlib import crc32

__all__ = ["crc32"]
