//! Where each inode lies in the meta area, and where its data does (format, section 4.6).
//!
//! Places are given in the order in which a depth-first walk enters the directories: the directory, then its children
//! that are none. Data of directories and links that begins on a block border leaves a gap before it; later inodes
//! fill the gaps, the smallest that fits first, the oldest among equals. That is upstream's order, which makes equal
//! trees equal images.

use std::collections::VecDeque;
use std::path::Path;

use super::BuildError;
use super::dirent;
use super::tree::Body;
use super::tree::NodeIndex;
use super::tree::Tree;
use super::wire::BLOCK;
use super::wire::ChunkAddress;
use super::wire::Inode;
use super::wire::SLOT;
use crate::limits::MAX_BOOTSTRAP_BYTES;

/// The data layout of an inode, with its number on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DataLayout {
    /// All data at a block address, or none.
    #[default]
    Plain = 0,
    /// Full blocks at a block address, the rest behind the inode.
    Inline = 2,
    /// Chunk addresses behind the inode.
    Chunks = 4,
}

/// Where one inode lies. Offsets are relative to the meta area.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// The inode.
    pub offset: u64,
    /// Its data layout.
    pub layout: DataLayout,
    /// Size of a directory or link; 0 for others.
    pub data_bytes: u64,
    /// Full blocks of the data, or all of it, see [`DataLayout`].
    pub data_offset: u64,
}

/// Places of all inodes.
#[derive(Debug)]
pub struct Layout {
    /// By node; meaningless for [`Body::Link`].
    pub places: Vec<Place>,
    /// End of the meta area.
    pub end: u64,
}

/// Bytes of an inode and its xattrs.
pub fn head_bytes(tree: &Tree, node: NodeIndex) -> u64 {
    (size_of::<Inode>() + tree.node(node).xattrs.len()) as u64
}

/// Gives every inode of `tree` its place.
///
/// # Errors
/// An image whose metadata would be larger than any reader takes; `bootstrap` is named.
pub fn place(tree: &Tree, bootstrap: &Path) -> Result<Layout, BuildError> {
    let mut space = Space::new();
    let mut places = vec![Place::default(); tree.nodes.len()];
    for &directory in &tree.directories {
        let data_bytes = dirent::bytes(&dirent::entries(tree, directory));
        places[directory as usize] = space.place_with_data(head_bytes(tree, directory), data_bytes);
        for child in tree.children(directory) {
            let head = head_bytes(tree, child);
            places[child as usize] = match &tree.node(child).body {
                // Placed when its turn comes, or already.
                Body::Directory(_) | Body::Link(_) => continue,
                Body::Symlink(target) => space.place_with_data(head, target.len() as u64),
                Body::Regular { chunks, .. } => space.place_with_chunks(head, chunks.len() as u64),
                Body::Device(_) | Body::Special => space.place_alone(head),
            };
        }
        if space.end > MAX_BOOTSTRAP_BYTES {
            let what = format!("metadata of more than {:#x} bytes", space.end);
            return Err(BuildError::format(bootstrap, what, format!("{MAX_BOOTSTRAP_BYTES:#x}")));
        }
    }
    Ok(Layout { places, end: space.end })
}

/// What is free of the meta area: everything behind `end`, and gaps before it.
struct Space {
    end: u64,
    /// Offsets of gaps by their number of slots. A gap ends with its block.
    gaps: Vec<VecDeque<u64>>,
}

impl Space {
    fn new() -> Self {
        // Inode number 0 means "none": the first block is left out.
        Self { end: BLOCK, gaps: vec![VecDeque::new(); (BLOCK / SLOT) as usize] }
    }

    fn place_alone(&mut self, bytes: u64) -> Place {
        let offset = self.end;
        self.end = (self.end + bytes).next_multiple_of(SLOT);
        Place { offset, ..Place::default() }
    }

    fn place_with_chunks(&mut self, head: u64, chunks: u64) -> Place {
        let address = size_of::<ChunkAddress>() as u64;
        let bytes = head.next_multiple_of(address) + chunks * address;
        let place = match self.take_gap(bytes) {
            Some(offset) => Place { offset, ..Place::default() },
            None => self.place_alone(bytes),
        };
        Place { layout: DataLayout::Chunks, ..place }
    }

    fn place_with_data(&mut self, head: u64, data_bytes: u64) -> Place {
        let tail = data_bytes % BLOCK;
        let place = match tail != 0 && head + tail <= BLOCK {
            true => self.place_inline(head + tail, data_bytes),
            false => self.place_plain(head, data_bytes),
        };
        self.end = self.end.next_multiple_of(SLOT);
        place
    }

    /// Inode and tail within one block, full blocks, if any, elsewhere.
    fn place_inline(&mut self, bytes: u64, data_bytes: u64) -> Place {
        let offset = self.take_gap(bytes).unwrap_or_else(|| {
            if self.end % BLOCK + bytes > BLOCK {
                self.start_block();
            }
            let offset = self.end;
            self.end += bytes;
            offset
        });
        if data_bytes >= BLOCK {
            self.start_block();
        }
        let data_offset = self.end;
        self.end += data_bytes - data_bytes % BLOCK;
        Place { offset, layout: DataLayout::Inline, data_bytes, data_offset }
    }

    /// All data on blocks of its own.
    fn place_plain(&mut self, head: u64, data_bytes: u64) -> Place {
        let offset = self.take_gap(head).unwrap_or_else(|| {
            let offset = self.end;
            self.end += head;
            offset
        });
        self.start_block();
        let data_offset = self.end;
        self.end = (self.end + data_bytes).next_multiple_of(BLOCK);
        Place { offset, layout: DataLayout::Plain, data_bytes, data_offset }
    }

    /// Moves the end to a block border; what is passed over becomes a gap.
    fn start_block(&mut self) {
        let gap = self.end;
        self.end = gap.next_multiple_of(BLOCK);
        self.keep_gap(gap);
    }

    /// Notes the rest of the block that `offset` is in as free.
    fn keep_gap(&mut self, offset: u64) {
        let offset = offset.next_multiple_of(SLOT);
        let slots = (offset.next_multiple_of(BLOCK) - offset) / SLOT;
        if slots != 0 {
            self.gaps[slots as usize].push_back(offset);
        }
    }

    /// Takes `bytes` from the smallest gap that has them.
    fn take_gap(&mut self, bytes: u64) -> Option<u64> {
        let slots = bytes.div_ceil(SLOT) as usize;
        let offset = self.gaps.iter_mut().skip(slots).find_map(VecDeque::pop_front)?;
        self.keep_gap(offset + bytes);
        Some(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gap_before_a_block_is_filled_by_what_fits_best() {
        let mut space = Space::new();
        assert_eq!(space.place_alone(64).offset, 4096);
        let directory = space.place_with_data(64, 4096 + 100);
        assert_eq!((directory.offset, directory.data_offset), (4160, 8192));
        assert_eq!(directory.layout, DataLayout::Inline);
        // 4160 + 164 rounded up to a slot.
        assert_eq!(space.place_with_chunks(64, 4).offset, 4352);
        assert_eq!(space.place_with_chunks(64, 0).offset, 4448);
        // Does not fit before 8192 any more.
        assert_eq!(space.place_with_chunks(64, 500).offset, 12288);
    }

    #[test]
    fn inode_with_tail_never_crosses_a_block() {
        let mut space = Space::new();
        for data_bytes in (1..9000).step_by(61) {
            let place = space.place_with_data(76, data_bytes);
            assert_eq!(place.offset % SLOT, 0);
            if place.layout == DataLayout::Inline {
                assert!(place.offset % BLOCK + 76 + data_bytes % BLOCK <= BLOCK, "{data_bytes}");
            }
            assert!(data_bytes < BLOCK || place.data_offset.is_multiple_of(BLOCK), "{data_bytes}");
        }
    }
}
