//! The end of a blob (tar headers, table of contents) and an OCI bootstrap layer: where is the bootstrap?

use nydus_vm::rafs::detect;
use nydus_vm::rafs::detect::Content;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::toc;
use nydus_vm::sys::view::View;

use crate::seeds;
use crate::seeds::SEED_BYTES;
use crate::seeds::Seed;

const HEADER_BYTES: usize = 512;

/// Looks for a bootstrap in the file behind the first byte of `data`. If that byte is even, the checksums of tar headers
/// are made right first, which no mutation would.
pub fn run(data: &[u8]) {
    let Some((first, file)) = data.split_first() else { return };
    let mut file = file.to_vec();
    if first & 1 == 0 {
        mend_checksums(&mut file);
    }
    let view = View::from_bytes(file);
    let sections = [toc::find_bootstrap(&view).ok().flatten(), inside(&view)];
    for section in sections.into_iter().flatten() {
        let end = section.offset.checked_add(section.compressed_bytes).expect("a section has an end");
        assert!(end <= view.len(), "a section inside the file");
        if section.compressor == Compressor::None {
            assert_eq!(section.compressed_bytes, section.uncompressed_bytes);
            let part = view.slice(section.offset..end).expect("a section inside the file");
            let _ = Image::open(part, &OpenOptions { placeholder_id: None });
        }
    }
}

fn inside(view: &View) -> Option<toc::Section> {
    match detect::detect(view) {
        Ok(Content::Inside(section)) => Some(section),
        _ => None,
    }
}

/// Of headers that begin at multiples of 512 from the front, and of those that do from the end.
fn mend_checksums(file: &mut [u8]) {
    let blocks = file.len() / HEADER_BYTES;
    for from in [0, file.len() % HEADER_BYTES] {
        for block in 0..blocks {
            let at = from + block * HEADER_BYTES;
            let Some(header) = file.get_mut(at..at + HEADER_BYTES) else { continue };
            if &header[257..262] == b"ustar" {
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
        }
    }
}

/// Blobs of the reference images with their middle cut out, so that offsets in their tables mean other places or none,
/// and a small layer.
pub fn seeds() -> Vec<Seed> {
    let mut found = vec![("layer".to_owned(), layer())];
    for (name, blob) in seeds::references(|name| name.contains("inline") && name.contains("-blobs-")) {
        let whole = blob.len() < SEED_BYTES;
        let tail = if whole { &blob[..] } else { &blob[blob.len() - SEED_BYTES / 2..] };
        found.push((name, [&[0], tail].concat()));
    }
    found
}

/// `image/image.boot` in a tar, behind another member.
fn layer() -> Vec<u8> {
    let mut file = vec![0];
    for (name, bytes) in [("image/other", 700usize), ("image/image.boot", 4096)] {
        let mut header = [0; HEADER_BYTES];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar  \0");
        file.extend(header);
        file.resize(file.len() + bytes.next_multiple_of(HEADER_BYTES), 1);
    }
    mend_checksums(&mut file[1..]);
    file
}
