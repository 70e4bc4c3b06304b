//! How the cache files of a blob are used: what a store decides for each of them.

use super::keeping::Keeping;

/// How the cache files of a blob are used.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Which boot of the machine this is.
    pub boot_id: [u8; 16],
    /// How chunks are kept.
    pub keeping: Keeping,
    /// How is known which chunks there are.
    pub index: Index,
}

impl Setup {
    /// What is usual: decoded chunks and upstream's chunk map.
    pub fn usual(boot_id: [u8; 16]) -> Self {
        Self { boot_id, keeping: Keeping::Plain, index: Index::Map }
    }
}

/// How is known which chunks a data file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// By upstream's chunk map.
    Map,
    /// By nothing that outlives a process: what is found is verified.
    None,
}
