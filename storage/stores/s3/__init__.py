"""`s3://bucket/prefix`: boto3 for credentials, signing and control; sockets of our own for the bytes.

options.py   what a URL may say
client.py    the only file that knows boto3: credentials, signatures, control requests, multipart
http.py      pooled connections; bodies straight from and into memory
refusals.py  pure: from a server's refusal to an error that says what to do
listing.py   pure: what listings answer, checked, and where they end
digests.py   pure: checksums that go along with what is put
uploads.py   pure: the parts that an object goes up in
probe.py     what the server honours
store.py     the object store of them all
"""
