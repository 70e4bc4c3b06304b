//! File systems.
pub mod image;
