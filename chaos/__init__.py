"""Faults, done to a real cluster on one machine, and what became of its answers and its pages.

Not a benchmark and not a test: it kills processes, and it writes docs/faults.md. It drives `penumbra up` from outside,
as a user and an unkind operator would, and knows no more of it than they do.

    table.py     the faults F01-F60: what is promised, and how each is done or why it can not be done here
    cluster.py   a cluster to do it to: signals, and what its workers say they hold
    hosts.py     one whose workers are hosts of their own, behind proxies (proxy.py) or in network namespaces (apart.py)
    streams.py   answers, compared token by token with those of a cluster that nothing happened to
    judge.py     striking a cluster while it answers
    faults.py    the faults of processes, of Redis, of clients and of the machine
    network.py   those of networks, and pairs of faults
    strike.py    one blow to a cluster that is somebody's own
    overload.py  more load than there is room for
    report.py    docs/faults.md, from the rows of the last runs
"""
