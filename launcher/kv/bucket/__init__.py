"""The store on an object store or a shared folder: no server, and no node whose loss ends it.

`register` is what is asked of the objects, `journal` the store as numbered versions of which each has one author,
`judge` tells leases that nobody renews, and `client` is the `KV` around them.

    log/0000000000000042     version 42 of the store: its keys and leases, and what the version has changed
    beat/1f                  what the holder of lease 1f writes anew from time to time
    elastic-moe              put by whoever comes, to find out whether it may
"""
