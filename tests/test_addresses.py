"""Which addresses are public, however they are written."""

from __future__ import annotations

import pytest

from gradient_blueprints.addresses import AddressRefused, check_address, read_network

PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
PRIVATE = """
    0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 169.254.170.2
    172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.168.0.1 198.18.0.1 203.0.113.7 224.0.0.1 240.0.0.1
    255.255.255.255 :: ::1 ::10.0.0.1 ::ffff:127.0.0.1 ::ffff:a9fe:a9fe ::ffff:0:127.0.0.1 64:ff9b::a9fe:a9fe
    64:ff9b:1::a00:1 100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe:: fc00::1 fd00:ec2::254 fe80::1 fe80::1%lo
    fec0::1 ff02::1
""".split()  # noqa: SIM905 - a list to read


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_passes(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_any_other_is_refused_in_every_form(address: str) -> None:
    with pytest.raises(AddressRefused, match="is not a public address"):
        check_address(address)


@pytest.mark.parametrize("text", ["localhost", "", "127.1", "0177.0.0.1", "0x7f000001", "2130706433", "[::1]"])
def test_what_is_no_numeric_address_is_refused(text: str) -> None:
    with pytest.raises(AddressRefused, match="is not an address"):
        check_address(text)


def test_a_network_that_is_allowed_passes_in_its_mapped_form_too() -> None:
    allowed = (read_network("10.0.0.0/8"), read_network("fd00::/8"))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1"):
        check_address(address, allowed)
    for address in ("192.168.0.1", "::ffff:192.168.0.1", "fe80::1"):
        with pytest.raises(AddressRefused):
            check_address(address, allowed)
