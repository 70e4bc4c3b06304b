//! Directory blocks (format, section 4.7): entries sorted over the whole directory, blocks filled greedily.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U64;

use super::tree::NodeIndex;
use super::tree::Tree;
use super::wire::BLOCK;
use super::wire::Dirent;

/// File type of a directory, for `.` and `..`.
const DIRECTORY: u8 = 2;

/// An entry of a directory, to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The path it stands for; the directory itself for `.`, its parent for `..`.
    pub node: NodeIndex,
    /// The type it states.
    pub file_type: u8,
}

/// The entries of `directory`, with `.` and `..`, sorted by name. The two are not always first: `!` sorts before them.
pub fn entries(tree: &Tree, directory: NodeIndex) -> Vec<NamedEntry<'_>> {
    let parent = tree.node(directory).parent;
    let children = tree.children(directory);
    let mut entries = Vec::with_capacity(children.len() + 2);
    entries.push(NamedEntry { name: b".", node: directory, file_type: DIRECTORY });
    entries.push(NamedEntry { name: b"..", node: parent, file_type: DIRECTORY });
    entries.extend(children.map(|child| {
        let node = tree.node(child);
        NamedEntry { name: &node.name, node: child, file_type: tree.node(tree.inode(child)).file_type() }
    }));
    entries.sort_unstable_by_key(|entry| entry.name);
    entries
}

/// Bytes that the blocks of `entries` have: full blocks count whole, the last as far as it is used.
pub fn bytes(entries: &[NamedEntry<'_>]) -> u64 {
    let mut total = 0;
    let mut rest = entries;
    while let Some((block, behind)) = split_block(rest) {
        total += match behind.is_empty() {
            true => used_bytes(block),
            false => BLOCK,
        };
        rest = behind;
    }
    total
}

/// The blocks of `entries` one after the other, [`bytes`] long.
pub fn encode(entries: &[NamedEntry<'_>], nid: impl Fn(NodeIndex) -> u64) -> Vec<u8> {
    let mut encoded: Vec<u8> = Vec::new();
    let mut rest = entries;
    while let Some((block, behind)) = split_block(rest) {
        encoded.resize(encoded.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_offset = size_of::<Dirent>() * block.len();
        for entry in block {
            let dirent = Dirent {
                nid: U64::new(nid(entry.node)),
                name_offset: U16::new(name_offset as u16), // inside a block
                file_type: entry.file_type,
                reserved: 0,
            };
            encoded.extend_from_slice(dirent.as_bytes());
            name_offset += entry.name.len();
        }
        block.iter().for_each(|entry| encoded.extend_from_slice(entry.name));
        rest = behind;
    }
    encoded
}

/// What goes into the next block, and what does not; `None` when nothing is left.
fn split_block<'a, 'b>(entries: &'b [NamedEntry<'a>]) -> Option<(&'b [NamedEntry<'a>], &'b [NamedEntry<'a>])> {
    let mut used = 0;
    let fitting = entries.iter().take_while(|entry| {
        used += entry_bytes(entry);
        used <= BLOCK
    });
    match fitting.count() {
        0 => None, // an entry has at most 267 bytes, so nothing is left
        count => Some(entries.split_at(count)),
    }
}

fn used_bytes(block: &[NamedEntry<'_>]) -> u64 {
    block.iter().map(entry_bytes).sum()
}

fn entry_bytes(entry: &NamedEntry<'_>) -> u64 {
    (size_of::<Dirent>() + entry.name.len()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[Vec<u8>]) -> Vec<NamedEntry<'_>> {
        names.iter().enumerate().map(|(i, name)| NamedEntry { name, node: i as u32, file_type: 1 }).collect()
    }

    #[test]
    fn bytes_of_entries_equals_length_of_their_blocks() {
        let check = |count: usize, name_bytes: usize, expected: u64| {
            let names: Vec<Vec<u8>> = (0..count).map(|i| format!("{i:0name_bytes$}").into_bytes()).collect();
            let entries = named(&names);
            assert_eq!(bytes(&entries), expected, "{count} names of {name_bytes} bytes");
            assert_eq!(encode(&entries, u64::from).len() as u64, expected);
        };
        check(0, 1, 0);
        check(1, 1, 13);
        check(17, 244, 4096 + 256); // exactly 16 fill a block
        check(16, 244, 4096);
        check(16, 245, 4096 + 257);
        check(100, 255, 6 * 4096 + 10 * 267);
    }

    #[test]
    fn encode_of_the_documented_directory_gives_the_documented_bytes() {
        let names: Vec<Vec<u8>> = [".", "..", "a", "empty", "hard-outside"].map(|n| n.as_bytes().to_vec()).to_vec();
        let nids = [746u64, 128, 751, 787, 175];
        let mut entries = named(&names);
        entries[..4].iter_mut().for_each(|entry| entry.file_type = 2);
        let encoded = encode(&entries, |node| nids[node as usize]);
        let expected = "ea020000000000003c000200\
                        80000000000000003d000200\
                        ef020000000000003f000200\
                        130300000000000040000200\
                        af0000000000000045000100";
        assert_eq!(hex::encode(&encoded[..60]), expected);
        assert_eq!(&encoded[60..], b"...aemptyhard-outside");
    }
}
