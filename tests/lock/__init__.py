"""What version 0.1.0 computed and wrote, to be the same whatever is moved or renamed.

`python -m tests.lock.write` wrote the files here, at the commit that their metadata names. Written
anew they would lock nothing: add a file for something new, and leave these.
"""
