"""`get_node_ip_address`: where the processes of a session reach one another."""

from __future__ import annotations


def get_node_ip_address() -> str:
    """Return the address at which all processes of the session reach a server that one of them starts.

    A session is on one machine, so this is the machine's own: nothing that listens there is open to the network.
    """
    return "127.0.0.1"
