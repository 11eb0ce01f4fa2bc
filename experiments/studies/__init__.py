"""What is compared with what: trials as data, and the studies that are made of them."""
