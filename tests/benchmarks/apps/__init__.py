"""The servers under test, one file for each contender: what a careful author would write, no more and no less.

Each serves `/ws` (the sockets) and three HTTP routes for the benchmark: `/members`, `/tasks`, `/broadcast`.
A contender never imports another one, so that no process carries what it does not use.
"""
