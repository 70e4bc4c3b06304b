//! Command lines: what users type, parsed with clap and checked, and nothing else.

pub mod image;
