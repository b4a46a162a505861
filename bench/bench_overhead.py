"""What gptkern costs where nothing is computed, against its peers: host time, import, first call."""


def test_overhead(cost, replayed):
    replayed(cost())
