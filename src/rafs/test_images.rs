//! Small images made from nothing, for tests that need no reference image: a writer that knows just what the reader's
//! tests want.

use sha2::Digest as _;

/// What a node is.
#[derive(Clone)]
pub(super) enum Content {
    Dir(Vec<Node>),
    /// Chunks of blob 0 by index, and the file's size.
    File(Vec<u32>, u64),
    Link(&'static str),
    Device(u32),
}

/// A name in a directory; names must be given in order.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) name: Vec<u8>,
    pub(super) content: Content,
    pub(super) xattrs: Vec<(&'static str, &'static str)>,
}

pub(super) const CHUNK: u64 = 4096;
/// Chunks of the one blob.
pub(super) const CHUNKS: u32 = 16;
/// Length of the blob's last chunk; the others are whole.
pub(super) const LAST_CHUNK: u64 = 100;
/// Chunks of the blob that are zeros.
pub(super) const ZERO_CHUNKS: [u32; 2] = [3, 4];

pub(super) fn node(name: &str, content: Content) -> Node {
    Node { name: name.as_bytes().to_vec(), content, xattrs: vec![] }
}

/// A tree with every kind of thing in it.
pub(super) fn sample() -> Vec<Node> {
    let mut attributed = node("attributed", Content::File(vec![15], LAST_CHUNK));
    attributed.xattrs = vec![("user.a", "value"), ("trusted.longer.name", ""), ("security.x", "yz")];
    let many = (0..500).map(|number| node(&format!("file-{number:05}"), Content::File(vec![], 0)));
    vec![
        attributed,
        node("chr", Content::Device(0x1234)),
        node("dir", Content::Dir(vec![node("sub", Content::Dir(vec![node("x", Content::Link("../y"))]))])),
        node("empty", Content::Dir(vec![])),
        node("link", Content::Link("/some/where")),
        node("many", Content::Dir(many.collect())),
        node("sparse", Content::File(vec![0, 1, 3, 4, 5, 3], 6 * CHUNK)),
        node("tail", Content::File(vec![0, 2, 15], 2 * CHUNK + LAST_CHUNK)),
    ]
}

fn chunk_bytes(index: u32) -> u64 {
    if index == CHUNKS - 1 { LAST_CHUNK } else { CHUNK }
}

pub(super) fn chunk_digest(index: u32) -> [u8; 32] {
    let byte = if ZERO_CHUNKS.contains(&index) { 0 } else { index as u8 + 1 };
    sha2::Sha256::digest(vec![byte; chunk_bytes(index) as usize]).into()
}

fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn pad(image: &mut Vec<u8>, unit: usize) {
    image.resize(image.len().next_multiple_of(unit), 0);
}

fn mode(content: &Content) -> u32 {
    match content {
        Content::Dir(_) => 0o40755,
        Content::File(..) => 0o100644,
        Content::Link(_) => 0o120777,
        Content::Device(_) => 0o20600,
    }
}

fn subdirectories(children: &[Node]) -> u32 {
    children.iter().filter(|child| matches!(child.content, Content::Dir(_))).count() as u32
}

/// Paths at and below `node`.
fn paths(node: &Node) -> u32 {
    let Content::Dir(children) = &node.content else { return 1 };
    1 + children.iter().map(paths).sum::<u32>()
}

fn chunk_record(index: u32, file_offset: u64) -> Vec<u8> {
    let mut record = chunk_digest(index).to_vec();
    for word in [0, 0, chunk_bytes(index) as u32, chunk_bytes(index) as u32] {
        record.extend_from_slice(&u32::to_le_bytes(word));
    }
    for word in [u64::from(index) * CHUNK, u64::from(index) * CHUNK, file_offset] {
        record.extend_from_slice(&word.to_le_bytes());
    }
    record.extend_from_slice(&index.to_le_bytes());
    record.extend_from_slice(&[0; 4]);
    record
}

/// One inode record of a v5 image in the making.
struct Row<'a> {
    node: &'a Node,
    parent: u32,
    /// Index of the first child, and their number.
    children: (u32, u32),
    digest: [u8; 32],
}

/// Gives the children of row `dir`, and all below, their indexes.
fn number<'a>(rows: &mut Vec<Row<'a>>, dir: usize) {
    let Content::Dir(children) = &rows[dir].node.content else { return };
    let first = rows.len();
    rows[dir].children = (if children.is_empty() { 0 } else { first as u32 + 1 }, children.len() as u32);
    for node in children {
        rows.push(Row { node, parent: dir as u32 + 1, children: (0, 0), digest: [0; 32] });
    }
    for child in first..first + children.len() {
        number(rows, child);
    }
}

/// Fills in the digests: children come behind their directory, so from the end.
fn digest_rows(rows: &mut [Row<'_>]) {
    for row in (0..rows.len()).rev() {
        let input: Vec<u8> = match &rows[row].node.content {
            Content::Dir(_) => {
                let (first, count) = rows[row].children;
                (0..count).flat_map(|child| rows[(first + child) as usize - 1].digest).collect()
            }
            Content::File(chunks, _) => chunks.iter().flat_map(|&chunk| chunk_digest(chunk)).collect(),
            Content::Link(target) => target.as_bytes().to_vec(),
            Content::Device(_) => vec![],
        };
        rows[row].digest = sha2::Sha256::digest(&input).into();
    }
}

/// A v5 image of `children` in the root, sha256, one blob `blob`, with right digests.
pub(super) fn v5(children: &[Node]) -> Vec<u8> {
    let root = node("/", Content::Dir(children.to_vec()));
    let mut rows = vec![Row { node: &root, parent: 0, children: (0, 0), digest: [0; 32] }];
    number(&mut rows, 0);
    digest_rows(&mut rows);

    let mut image = vec![0; 8192 + rows.len() * 4];
    pad(&mut image, 8);
    let blob_table = image.len();
    image.extend_from_slice(&[0; 8]);
    image.extend_from_slice(b"blob\0\0\0\0");
    let extended = image.len();
    image.extend_from_slice(&[0; 64]);
    put(&mut image, extended, &CHUNKS.to_le_bytes());
    put(&mut image, extended + 8, &(u64::from(CHUNKS) * CHUNK).to_le_bytes());
    put(&mut image, extended + 16, &(u64::from(CHUNKS) * CHUNK).to_le_bytes());
    for (slot, row) in rows.iter().enumerate() {
        let number = (image.len() / 8) as u32;
        put(&mut image, 8192 + slot * 4, &number.to_le_bytes());
        append_record(&mut image, slot, row);
    }
    let count = rows.len() as u32;
    for (at, word) in [
        (0, 0x5241_4653),
        (4, 0x500),
        (8, 8192),
        (12, CHUNK as u32),
        (16, 0x39), // no compression, sha256, ids, xattrs
        (24, count),
        (32, 8192),
        (48, blob_table as u32),
        (56, count),
        (64, 16),
        (68, 1),
        (72, extended as u32),
    ] {
        put(&mut image, at, &u32::to_le_bytes(word));
    }
    image
}

fn append_record(image: &mut Vec<u8>, slot: usize, row: &Row<'_>) {
    let at = image.len();
    let (size, nlink, symlink, rdev) = match &row.node.content {
        Content::Dir(children) => (4096, 2 + subdirectories(children), 0, 0),
        Content::File(_, size) => (*size, 1, 0, 0),
        Content::Link(target) => (target.len() as u64, 1, target.len(), 0),
        Content::Device(rdev) => (0, 1, 0, *rdev),
    };
    let chunks = if let Content::File(chunks, _) = &row.node.content { chunks.as_slice() } else { &[] };
    let count = if chunks.is_empty() { row.children.1 } else { chunks.len() as u32 };
    put(image, at, &row.digest);
    put(image, at + 32, &u64::from(row.parent).to_le_bytes());
    put(image, at + 40, &(slot as u64 + 1).to_le_bytes());
    put(image, at + 60, &mode(&row.node.content).to_le_bytes());
    put(image, at + 64, &size.to_le_bytes());
    put(image, at + 80, &(u64::from(!row.node.xattrs.is_empty()) * 4).to_le_bytes());
    put(image, at + 88, &nlink.to_le_bytes());
    put(image, at + 92, &row.children.0.to_le_bytes());
    put(image, at + 96, &count.to_le_bytes());
    put(image, at + 100, &(row.node.name.len() as u16).to_le_bytes());
    put(image, at + 102, &(symlink as u16).to_le_bytes());
    put(image, at + 104, &rdev.to_le_bytes());
    put(image, at + 120, &[0; 8]);
    image.extend_from_slice(&row.node.name);
    pad(image, 8);
    if let Content::Link(target) = &row.node.content {
        image.extend_from_slice(target.as_bytes());
        pad(image, 8);
    }
    if !row.node.xattrs.is_empty() {
        let mut pairs = Vec::new();
        for (name, value) in &row.node.xattrs {
            pairs.extend_from_slice(&(name.len() as u32 + 1 + value.len() as u32).to_le_bytes());
            pairs.extend_from_slice(format!("{name}\0{value}").as_bytes());
        }
        image.extend_from_slice(&(pairs.len() as u64).to_le_bytes());
        image.extend_from_slice(&pairs);
        pad(image, 8);
    }
    for (number, &chunk) in chunks.iter().enumerate() {
        image.extend_from_slice(&chunk_record(chunk, number as u64 * CHUNK));
    }
}

/// Where the parts of [`v6`] images begin.
pub(super) const V6_BLOB_TABLE: usize = 4096;
const V6_META: usize = 8192;

/// A v6 image of `children` in the root, sha256, one blob `blob`. Every second inode is compact.
pub(super) fn v6(children: &[Node]) -> Vec<u8> {
    let mut image = vec![0; V6_META + 128 * 32];
    let root = node("", Content::Dir(children.to_vec()));
    let root_nid = image.len() / 32 - V6_META / 32;
    let body = inode_bytes(&root, directory_bytes(children));
    image.resize(image.len() + body, 0);
    fill_v6(&mut image, &root, root_nid as u64, root_nid as u64);
    pad(&mut image, 4096);
    let chunk_table = image.len();
    let mut order: Vec<u32> = (0..CHUNKS).filter(|&chunk| chunk != ZERO_CHUNKS[1]).collect();
    order.sort_by_key(|&chunk| chunk_digest(chunk));
    // The second chunk of zeros is there too: an image without deduplication.
    order.push(ZERO_CHUNKS[1]);
    for chunk in order {
        image.extend_from_slice(&chunk_record(chunk, 0));
    }
    pad(&mut image, 4096);

    for (at, word) in [
        (1024, 0xe0f5_e1e2),
        (1032, 0x4000_0000),
        (1036, 12 | (root_nid as u32) << 16),
        (1040, paths(&root)),
        (1064, (V6_META / 4096) as u32),
        (1104, 0xc),
        (1108, 1 << 16),
        (1112, 11),
        (1152, 0x39),
        (1160, V6_BLOB_TABLE as u32),
        (1168, 256),
        (1172, CHUNK as u32),
        (1176, chunk_table as u32),
        (1184, CHUNKS * 80),
        (1472, CHUNKS),
        (V6_BLOB_TABLE + 68, CHUNK as u32),
        (V6_BLOB_TABLE + 72, CHUNKS),
        (V6_BLOB_TABLE + 80, 1),
        (V6_BLOB_TABLE + 84, 0x4000_0001),
        (V6_BLOB_TABLE + 88, 1 << 20),
        (V6_BLOB_TABLE + 96, CHUNKS * CHUNK as u32),
        (V6_BLOB_TABLE + 112, 1 << 18),
        (V6_BLOB_TABLE + 120, 100),
        (V6_BLOB_TABLE + 128, CHUNKS * 16),
    ] {
        put(&mut image, at, &u32::to_le_bytes(word));
    }
    put(&mut image, 1408, b"blob");
    put(&mut image, V6_BLOB_TABLE, b"blob");
    image
}

fn xattr_bytes(node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in &node.xattrs {
        let (prefix, rest) = name.split_once('.').unwrap();
        let number = match prefix {
            "user" => 1,
            "trusted" => 4,
            "security" => 6,
            other => panic!("{other}"),
        };
        bytes.extend_from_slice(&[rest.len() as u8, number, value.len() as u8, 0]);
        bytes.extend_from_slice(format!("{rest}{value}").as_bytes());
        pad(&mut bytes, 4);
    }
    if !bytes.is_empty() {
        bytes.splice(0..0, [0; 12]);
    }
    bytes
}

/// Bytes of an inode with what follows it. Directories have their data here too, unless they are larger than a block.
fn inode_bytes(node: &Node, data: usize) -> usize {
    let body = match &node.content {
        Content::Dir(_) if data > 3000 => 0,
        Content::Dir(_) => data,
        Content::File(chunks, _) => chunks.len() * 8 + 8,
        Content::Link(target) => target.len(),
        Content::Device(_) => 0,
    };
    64 + xattr_bytes(node).len() + body
}

/// Names of a directory in order, `.` and `..` among them.
fn directory_names(children: &[Node]) -> Vec<(Vec<u8>, Option<&Node>)> {
    let mut names: Vec<_> = children.iter().map(|child| (child.name.clone(), Some(child))).collect();
    names.extend([(b".".to_vec(), None), (b"..".to_vec(), None)]);
    names.sort_by(|left, right| left.0.cmp(&right.0));
    names
}

/// How many names go into each block.
fn directory_blocks(children: &[Node]) -> Vec<Vec<(Vec<u8>, Option<&Node>)>> {
    let mut blocks = vec![Vec::new()];
    let mut used = 0;
    for name in directory_names(children) {
        let bytes = 12 + name.0.len();
        if used + bytes > 4096 {
            blocks.push(Vec::new());
            used = 0;
        }
        used += bytes;
        blocks.last_mut().unwrap().push(name);
    }
    blocks
}

fn directory_bytes(children: &[Node]) -> usize {
    let blocks = directory_blocks(children);
    let last: usize = blocks[blocks.len() - 1].iter().map(|name| 12 + name.0.len()).sum();
    (blocks.len() - 1) * 4096 + last
}

/// Writes the inode at `nid`, whose room is there already, then its children behind the end.
fn fill_v6(image: &mut Vec<u8>, node: &Node, nid: u64, parent: u64) {
    let at = V6_META + nid as usize * 32;
    let xattrs = xattr_bytes(node);
    let xattr_count = if xattrs.is_empty() { 0 } else { (xattrs.len() - 12) / 4 + 1 };
    let is_compact = nid % 2 == 1;
    let inode = if is_compact { 32 } else { 64 };
    let (layout, size, union, nlink) = match &node.content {
        Content::Dir(children) => (2, directory_bytes(children) as u64, 0, 2 + subdirectories(children)),
        Content::File(_, size) => (4, *size, 0x20, 1),
        Content::Link(target) => (2, target.len() as u64, 0, 1),
        Content::Device(rdev) => (0, 0, *rdev, 1),
    };
    put(image, at, &(layout << 1 | u16::from(!is_compact)).to_le_bytes());
    put(image, at + 2, &(xattr_count as u16).to_le_bytes());
    put(image, at + 4, &(mode(&node.content) as u16).to_le_bytes());
    put(image, at + 8, &size.to_le_bytes());
    put(image, at + 16, &union.to_le_bytes());
    if is_compact {
        put(image, at + 6, &(nlink as u16).to_le_bytes());
    } else {
        put(image, at + 44, &nlink.to_le_bytes());
    }
    put(image, at + inode, &xattrs);
    let body = at + inode + xattrs.len();
    match &node.content {
        Content::File(chunks, _) => {
            for (number, &chunk) in chunks.iter().enumerate() {
                let entry = [chunk as u8, 0, 1, 0, chunk as u8, 0, 0, 0];
                put(image, body.next_multiple_of(8) + number * 8, &entry);
            }
        }
        Content::Link(target) => put(image, body, target.as_bytes()),
        Content::Dir(children) => fill_directory(image, children, nid, parent, at, body),
        Content::Device(_) => {}
    }
}

fn fill_directory(image: &mut Vec<u8>, children: &[Node], nid: u64, parent: u64, at: usize, body: usize) {
    let bytes = directory_bytes(children);
    let mut start = body;
    if bytes > 3000 {
        pad(image, 4096);
        start = image.len();
        image.resize(start + bytes, 0);
        let format = u16::from(image[at] & 1).to_le_bytes();
        put(image, at, &format);
        put(image, at + 16, &((start / 4096) as u32).to_le_bytes());
    }
    let mut nids = Vec::new();
    for child in children {
        let data = if let Content::Dir(children) = &child.content { directory_bytes(children) } else { 0 };
        pad(image, 32);
        let room = inode_bytes(child, data);
        // Inline data stay within one block.
        if image.len() / 4096 != (image.len() + room - 1) / 4096 {
            pad(image, 4096);
        }
        nids.push(((image.len() - V6_META) / 32) as u64);
        image.resize(image.len() + room, 0);
    }
    let mut next = nids.iter();
    for (number, block) in directory_blocks(children).into_iter().enumerate() {
        let block_at = start + number * 4096;
        let mut name_at = block.len() * 12;
        for (slot, (name, child)) in block.iter().enumerate() {
            let (target, kind) = match child.map(|child| &child.content) {
                None if name == b"." => (nid, 2),
                None => (parent, 2),
                Some(content) => (
                    *next.next().unwrap(),
                    match content {
                        Content::Dir(_) => 2,
                        Content::File(..) => 1,
                        Content::Link(_) => 7,
                        Content::Device(_) => 3,
                    },
                ),
            };
            let entry = block_at + slot * 12;
            put(image, entry, &target.to_le_bytes());
            put(image, entry + 8, &(name_at as u16).to_le_bytes());
            put(image, entry + 10, &[kind, 0]);
            put(image, block_at + name_at, name);
            name_at += name.len();
        }
    }
    for (child, &child_nid) in children.iter().zip(&nids) {
        fill_v6(image, child, child_nid, nid);
    }
}
