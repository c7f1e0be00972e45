"""From a checkpoint to a state: which bytes a rank needs, which rank fetches them, and where they go.

The words for bytes, here and in `storage.verified`:

    chunk        a box of a tensor that is stored as one; DCP's word
    item         what is stored of a chunk or a value: one `torch.save` zip, at its place in an object
    block        what has a checksum of its own: an item is cut into blocks of one size, and read in whole ones
    want         bytes of an item that one target takes
    stripes      ranges of bytes of equal length and distance: what a box takes of a row-major chunk
    target       what takes the bytes: a tensor's memory, an item's own, or slabs
    slab         a few MiB of host memory, for a tensor that takes no bytes as they are (another device or dtype)
    part         one request: a range of an object, of whole blocks
    segment      blocks of one item within a part, and the memory that they go into
    shared part  a part that several ranks need: its owner fetches it, and sends the others messages
    message      what goes from one rank to another at once: a long range, or all that lies between the long ones

A range is [start, stop), in bytes, and counted from

    an object's first byte   parts, segments, shared parts, and whatever a verifier is given
    an item's first byte     wants and stripes (`Segment.item_start` says where in its item a segment begins)
    a target's first byte    `Want.at`: where the bytes of a want go, stripes laid end to end
    the axis                 all objects one after the other: what ranks tell each other, and agree on (`Index.axis`)
"""
