//! Makers of test data, and what plays the other side in tests and benches: above all other rooms, in no release.

pub mod manifest;
