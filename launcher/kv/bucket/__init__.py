"""The store on an object store or a shared folder: no server, and no node whose loss ends it.

`register` is what is asked of the objects, `journal` the store as numbered versions of which each has one author,
`ops` what one client may write for others, `judge` tells leases that nobody renews, `client` is the `KV` around them.

    log/0000000000000042     version 42 of the store: its keys and leases, and what the version has changed
    beat/1f                  what the holder of lease 1f writes anew from time to time
    wish/4e0c...             changes that a client wants, for whoever writes the next version; soon removed
    turn/0000000000000043    put by who writes version 43 for all that wish; soon removed
    elastic-moe              put by whoever comes, to find out whether it may
"""
