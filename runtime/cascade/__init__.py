"""Serve each query from the cheapest model that will do.

    traces     what every member answered, recorded
    calibrate  thresholds from traces, without labels, under a bound on cost
    policy     who answers a request; may be changed while the server runs
    gateway    asks the policy, and calls members until there is an answer
    accounts   reserves before a call, settles after it, watches for drift
    ledger     attempts, requests and budgets on disk
    server     the HTTP face
    drift      whether traffic is still what it was

Nothing is imported here, so that a command loads only what it needs.
"""
