"""`s3://bucket/prefix`: boto3 for credentials, signing and control; sockets of our own for the bytes.

options.py      what a URL may say
client.py       the only file that knows boto3: credentials, signatures, control requests, multipart
connections.py  pooled connections; bodies straight from memory
responses.py    answers with an end; bodies straight into memory
refusals.py     pure: from a server's refusal to an error that says what to do
listing.py      pure: what listings answer, checked, and where they end
digests.py      pure: checksums that go along with what is put
etags.py        pure: what servers say of an object's version
uploads.py      pure: how large the parts of an object are that goes up in parts
probe.py        what the server honours
bucket.py       a store whose every operation is one request
store.py        the object store of them all: with retries, and large objects in parts
"""
