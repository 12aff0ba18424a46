"""Which weights become zero, how many of them, and when: pure parts that compose."""
