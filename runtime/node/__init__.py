"""The node daemon: one per machine; leases workers, keeps the host store's books, knows the actors."""
