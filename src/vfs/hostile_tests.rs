//! Damaged images and guests that make things up: whatever comes, each request ends exactly once, and nothing panics.

use proptest::prelude::*;

use super::tests::Guest;
use super::tests::SAFE;
use crate::fs::image::Xattrs;
use crate::fuse::recording::Ending;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::storage::backend::BackendError;
use crate::sys::view::View;
use crate::testing::fault::Fault;
use crate::testing::fuse_client::Request as Ask;
use crate::testing::fuse_client::init_flag;
use crate::testing::fuse_client::opcode;
use crate::testing::manifest;

/// A number that is often small, often huge, and often near something.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..300, any::<u64>(), Just(u64::MAX), Just(1 << 31), (0u64..64).prop_map(|shift| 1 << shift)]
}

fn node() -> impl Strategy<Value = u64> {
    prop_oneof![Just(1u64), (0u64..2000).prop_map(|inode| 1 << 32 | inode), number()]
}

fn ask() -> impl Strategy<Value = Ask> {
    let size = prop_oneof![0u32..200, Just(4096u32), Just(1 << 20)];
    (node(), number(), size, 0usize..12, proptest::collection::vec(1u8..=255, 1..20)).prop_map(
        |(node, offset, size, which, name)| match which {
            0 => Ask::lookup(node, &name),
            1 => Ask::lookup(node, b".."),
            2 => Ask::getattr(node),
            3 => Ask::readdir(node, 0, offset, size),
            4 => Ask::readdirplus(node, 0, offset, size),
            5 => Ask::readlink(node),
            6 => Ask::read(node, 0, offset, size),
            7 => Ask::lseek(node, 0, offset, 3 + size % 2),
            8 => Ask::getxattr(node, &name, size),
            9 => Ask::listxattr(node, size),
            10 => Ask::statfs(node),
            _ => Ask::new(opcode::ACCESS, node, &[size as u8, 0, 0, 0, 0, 0, 0, 0], 0),
        },
    )
}

proptest! {
    #[test]
    fn damaged_images_and_made_up_requests_end_in_answers(
        name in proptest::sample::select(&["v5-lz4-blake3", "v6-lz4-blake3", "v5-zstd-sha256-4k", "v6-zstd-4k"]),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..40),
        asks in proptest::collection::vec(ask(), 1..200),
    ) {
        let Some(images) = manifest::reference_images() else { return Ok(()) };
        let folder = images.join(name);
        let mut bytes = std::fs::read(folder.join("bootstrap")).unwrap();
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        // Many images are refused when they are opened; that is an answer too.
        let Ok(image) = Image::open(View::from_bytes(bytes), &OpenOptions { placeholder_id: None }) else {
            return Ok(());
        };
        // Blobs whose sizes were damaged would make cache files of terabytes.
        if image.blobs().iter().any(|blob| blob.uncompressed_bytes > 1 << 30) {
            return Ok(());
        }
        let guest = Guest::over(image, &folder, Xattrs::Served, SAFE);
        guest.backend.set(Fault::Fail(BackendError::Lasting("none of its business".into())));
        guest.start(&Ask::init(41, init_flag::LINUX_6_12)).wait().body();
        for ask in asks {
            prop_assert!(matches!(guest.start(&ask).wait(), Ending::Reply { .. }), "{:?}", ask);
        }
    }
}
