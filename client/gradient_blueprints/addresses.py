"""Which addresses a connection may go to whose target a stranger has a say in: public ones, and what is allowed.

The question is asked of the address that a socket connects to, never of a name: a name may answer otherwise the next
time (DNS rebinding), and a redirect may lead anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

# Not `is_global` of the standard library: what that answers for mapped, translated and multicast addresses differs
# between Python's versions (CVE-2024-4032). https://www.iana.org/assignments/iana-ipv4-special-registry
_NOT_PUBLIC_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # shared by a carrier's customers; the metadata of one cloud is at 100.100.100.200
            "127.0.0.0/8",
            "168.63.129.16/32",  # a public number, and within Azure the platform's own server
            "169.254.0.0/16",  # link-local; the metadata of most clouds is at 169.254.169.254
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_PUBLIC_IPV6 = IPv6Network("2000::/3")  # all that was given out as global unicast; the rest is local or of no use
_NOT_PUBLIC_IPV6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocols' own, Teredo among them, which holds an IPv4 address
            "2001:db8::/32",
            "2002::/16",  # 6to4, which holds an IPv4 address
            "3fff::/20",
        ),
    )
)
_TRANSLATED = IPv6Network("64:ff9b::/96")  # NAT64: the last four bytes are the IPv4 address that is meant (RFC 6052)


class AddressRefused(Exception):
    """A connection that is not made because of where it would go. Not an OSError: nobody is to try it again."""


def check_address(address: str, allowed: Iterable[Network] = ()) -> None:
    """AddressRefused unless this numeric address is public or lies in one of `allowed`.

    >>> check_address("93.184.215.14")
    >>> check_address("::ffff:169.254.169.254")
    Traceback (most recent call last):
    gradient_blueprints.addresses.AddressRefused: ::ffff:169.254.169.254 is not a public address
    """
    try:
        meant = _meant(ip_address(address))
    except ValueError:
        raise AddressRefused(f"{address!r} is not an address") from None
    if not _is_public(meant) and not any(meant in network for network in allowed if network.version == meant.version):
        raise AddressRefused(f"{address} is not a public address")


def _meant(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that packets to a mapped or translated one go to."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _TRANSLATED:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_IPV4)
    return address in _PUBLIC_IPV6 and not any(address in network for network in _NOT_PUBLIC_IPV6)


def read_network(text: str) -> Network:
    """`10.0.0.0/8`, `fd00::/8`, or a single address; ValueError for anything else."""
    return ip_network(text.strip())
