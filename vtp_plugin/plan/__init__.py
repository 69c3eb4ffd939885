"""What pruning saves on a card before it is rented: a roofline per part, and a queue that turns it into throughput."""
