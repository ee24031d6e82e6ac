//! Over mock engines as processes, two of each role.
