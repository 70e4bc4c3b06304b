//! `nydusd` from outside: exit codes, what is said on stderr, signals, sockets, and a file read through it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod check;
mod life;
mod place;
