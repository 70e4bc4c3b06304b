//! Fuzz targets: whatever the bytes, no panic, no endless loop, and answers that keep their own rules.
//!
//! One module per target, each with `run` (one input) and `seeds` (good inputs to begin with). The programs in
//! `targets/` only tie them to libFuzzer. `scripts/fuzz` builds and runs them; so does
//! `cargo fuzz run TARGET --sanitizer none --fuzz-dir scripts/fuzz-targets`. What a target finds becomes a named test
//! beside the code that was wrong.

pub mod blob_meta;
pub mod blob_tail;
pub mod bootstrap;
pub mod cache_files;
pub mod chains;
pub mod codec;
pub mod config;
pub mod input;
pub mod mutate;
pub mod requests;
pub mod seeds;
pub mod served;
pub mod unit;
