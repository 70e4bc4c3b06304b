//! `nydusd` from outside: exit codes, what is said on stderr, signals, sockets, and a file read through it.

mod bad_input;
mod life;
mod place;
