//! Command lines: what users type, parsed with clap and checked, and what comes back to them: one line and an exit code.

pub mod image;
pub mod nydusd;
