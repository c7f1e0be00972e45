"""States in the memory of nodes: which there are, which is whole, and where each of its bytes is best read.

A *part* is what one rank has staged for one attempt: data objects as an upload would put them, and its *papers*, which
say what they hold and what each block must sum up to. A node's service holds the parts of its own ranks and *copies* of
a buddy's; its *inventory* says which. A *label* is the short form of the papers that everybody is told.
"""
