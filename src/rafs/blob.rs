//! What both versions say of blobs and algorithms: ids, feature bits, superblock flags (format, sections 1.1, 1.3, 1.4
//! and 14, rules 2 and 4).

use super::NEWER_TOOLS;
use super::NO_TOOLS;
use super::RafsError;
use super::facts::BlobFacts;
use super::facts::Compressor;
use super::facts::Digester;
use super::facts::feature;
use super::malformed;
use super::unknown;
use crate::limits;

/// The id of a blob in metadata that is inlined in that blob (section 10.3).
const PLACEHOLDER_ID: [u8; 64] = [b'x'; 64];

const COMPRESSION_NONE: u64 = 0x1;
const COMPRESSION_LZ4: u64 = 0x2;
const HASH_BLAKE3: u64 = 0x4;
const HASH_SHA256: u64 = 0x8;
const EXPLICIT_UID_GID: u64 = 0x10;
const HAS_XATTR: u64 = 0x20;
const COMPRESSION_GZIP: u64 = 0x40;
const COMPRESSION_ZSTD: u64 = 0x80;
const TARFS_MODE: u64 = 0x200;
/// All bits with a meaning, those for encryption (which the blob table tells of each blob), and those reserved as
/// compatible.
const KNOWN_FLAGS: u64 = 0x3ff | 0xff00_0000;

/// Feature bits that a reader must understand.
const INCOMPATIBLE_FEATURES: u32 = 0xffff;
const KNOWN_FEATURES: u32 = 0xfff;
const COMPATIBLE_FEATURES: u32 = feature::HAS_TAR_HEADER | feature::HAS_TOC | feature::CAP_TAR_TOC;

/// What is blamed where no blob is.
const THE_IMAGE: &str = "the image";

/// The superblock flags, checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flags {
    pub(super) compressor: Compressor,
    pub(super) digester: Digester,
    pub(super) has_owner_ids: bool,
    pub(super) has_xattrs: bool,
    /// Blocks of 512 bytes, blobs that are tars; v6 only.
    pub(super) is_tarfs: bool,
}

impl Flags {
    pub(super) fn parse(raw: u64, at: u64) -> Result<Self, RafsError> {
        if raw & !KNOWN_FLAGS != 0 {
            return Err(unknown(format!("superblock flags {:#x}", raw & !KNOWN_FLAGS), THE_IMAGE, NEWER_TOOLS));
        }
        let compression = raw & (COMPRESSION_NONE | COMPRESSION_LZ4 | COMPRESSION_GZIP | COMPRESSION_ZSTD);
        let compressor = match compression {
            COMPRESSION_NONE => Compressor::None,
            // Without any bit old images mean lz4.
            COMPRESSION_LZ4 | 0 => Compressor::Lz4Block,
            COMPRESSION_GZIP => Compressor::Gzip,
            COMPRESSION_ZSTD => Compressor::Zstd,
            _ => return Err(malformed("superblock flags", at, format!("several compressors ({compression:#x})"))),
        };
        let digester = match raw & (HASH_BLAKE3 | HASH_SHA256) {
            HASH_BLAKE3 | 0 => Digester::Blake3,
            HASH_SHA256 => Digester::Sha256,
            _ => return Err(malformed("superblock flags", at, "several digest algorithms")),
        };
        Ok(Self {
            compressor,
            digester,
            has_owner_ids: raw & EXPLICIT_UID_GID != 0,
            has_xattrs: raw & HAS_XATTR != 0,
            is_tarfs: raw & TARFS_MODE != 0,
        })
    }
}

/// The compressor with the number `raw` (section 1.1).
pub(super) fn compressor(raw: u32) -> Option<Compressor> {
    match raw {
        0 => Some(Compressor::None),
        1 => Some(Compressor::Lz4Block),
        2 => Some(Compressor::Gzip),
        3 => Some(Compressor::Zstd),
        _ => None,
    }
}

/// The digest algorithm with the number `raw` (section 1.1).
pub(super) fn digester(raw: u32) -> Option<Digester> {
    match raw {
        0 => Some(Digester::Blake3),
        1 => Some(Digester::Sha256),
        _ => None,
    }
}

/// The feature bits of the v6 blob `id`: unknown incompatible bits are refused, unknown others dropped.
pub(super) fn features(raw: u32, id: &str, at: u64) -> Result<u32, RafsError> {
    let strange = raw & INCOMPATIBLE_FEATURES & !KNOWN_FEATURES;
    if strange != 0 {
        return Err(unknown(format!("blob features {strange:#x}"), format!("blob {id}"), NEWER_TOOLS));
    }
    let needs_v2 = feature::ZRAN | feature::BATCH | feature::ENCRYPTED;
    if raw & needs_v2 != 0 && raw & feature::CHUNK_INFO_V2 == 0 {
        return Err(malformed("blob features", at, format!("{raw:#x} lacks CHUNK_INFO_V2")));
    }
    if raw & feature::ZRAN != 0 && raw & feature::SEPARATE == 0 {
        return Err(malformed("blob features", at, format!("{raw:#x}: ZRAN without SEPARATE")));
    }
    for (bits, reason) in CONTRADICTIONS {
        if raw & bits == bits {
            return Err(malformed("blob features", at, format!("{raw:#x}: {reason} exclude each other")));
        }
    }
    Ok(raw & (KNOWN_FEATURES | COMPATIBLE_FEATURES))
}

/// Pairs of features of which a blob has at most one.
const CONTRADICTIONS: [(u32, &str); 7] = [
    (feature::ALIGNED | feature::TARFS, "ALIGNED and TARFS"),
    // Blobs have one array of contexts.
    (feature::ZRAN | feature::BATCH, "ZRAN and BATCH"),
    // What is not ours is not encrypted by us; and the key stands where the digest of the separate file would be.
    (feature::SEPARATE | feature::ENCRYPTED, "SEPARATE and ENCRYPTED"),
    // The blob is a tar, and has no table.
    (feature::TARFS | feature::SEPARATE, "TARFS and SEPARATE"),
    (feature::TARFS | feature::ZRAN, "TARFS and ZRAN"),
    (feature::TARFS | feature::BATCH, "TARFS and BATCH"),
    (feature::TARFS | feature::ENCRYPTED, "TARFS and ENCRYPTED"),
];

/// The feature bits of the v5 blob `id`. Unknown bits are dropped, as old builders left some there; what needs a table in the
/// blob is refused, since v5 has none.
pub(super) fn v5_features(raw: u32, id: &str) -> Result<u32, RafsError> {
    let unread = [
        (feature::TARFS, "TARFS"),
        (feature::ZRAN, "ZRAN"),
        // The builder takes the option, and forgets the key.
        (feature::ENCRYPTED, "ENCRYPTED"),
        (feature::BATCH, "BATCH"),
    ];
    for (bit, name) in unread {
        if raw & bit != 0 {
            return Err(unknown(
                format!("blob features {bit:#x} ({name})"),
                format!("the RAFS v5 blob {id}"),
                NO_TOOLS,
            ));
        }
    }
    Ok(raw & (KNOWN_FEATURES | COMPATIBLE_FEATURES))
}

/// The blob id in `raw`, or `real` where the metadata has the placeholder. It becomes a file name and part of URLs, so
/// only harmless characters are let through (section 14, rule 4).
pub(super) fn id(raw: &[u8], real: Option<&str>, index: u32, at: u64) -> Result<String, RafsError> {
    let id = if *raw == PLACEHOLDER_ID { real.ok_or(RafsError::PlaceholderBlobId { index })?.as_bytes() } else { raw };
    let is_harmless = id.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if id.is_empty() || id.len() > limits::MAX_BLOB_ID_BYTES || !is_harmless || id.starts_with(b".") {
        let shown = String::from_utf8_lossy(id.get(..80).unwrap_or(id)).into_owned();
        return Err(malformed("blob id", at, format!("{shown:?} cannot be a file name and part of a URL")));
    }
    Ok(id.iter().map(|&byte| char::from(byte)).collect())
}

/// Refuses two blobs with one id: they would share one cache file.
pub(super) fn check_unique(blobs: &[BlobFacts], table_at: u64) -> Result<(), RafsError> {
    let mut ids: Vec<&str> = blobs.iter().map(|blob| blob.id.as_str()).collect();
    ids.sort_unstable();
    for pair in ids.windows(2) {
        if let [first, second] = pair
            && first == second
        {
            return Err(malformed("blob id", table_at, format!("{first} stands twice in the blob table")));
        }
    }
    Ok(())
}

/// Checks a chunk size: a power of two from 4 KiB to 16 MiB (section 14, rule 3).
pub(super) fn chunk_bytes(raw: u32, at: u64) -> Result<u32, RafsError> {
    if raw.is_power_of_two() && (limits::MIN_CHUNK_BYTES..=limits::MAX_CHUNK_BYTES).contains(&raw) {
        return Ok(raw);
    }
    Err(malformed("chunk size", at, format!("{raw} is no power of two from 4096 to 16 MiB")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_that_could_leave_the_directory_is_refused() {
        for bad in [&b""[..], b"..", b".hidden", b"a/b", b"a\0b", b"a b", b"\xc3\xa4", &[b'a'; 256], b"a?b"] {
            assert!(matches!(id(bad, None, 0, 0), Err(RafsError::Malformed { .. })), "{bad:?}");
        }
        assert_eq!(id(b"0aZ._-", None, 0, 0).unwrap(), "0aZ._-");
    }

    #[test]
    fn placeholder_id_is_replaced_or_asked_for() {
        assert_eq!(id(&PLACEHOLDER_ID, Some("real"), 3, 0).unwrap(), "real");
        assert!(matches!(id(&PLACEHOLDER_ID, None, 3, 0), Err(RafsError::PlaceholderBlobId { index: 3 })));
        assert!(id(&PLACEHOLDER_ID, Some("../x"), 3, 0).is_err(), "the real id is checked too");
    }

    #[test]
    fn flags_unknown_or_contradictory_are_refused() {
        for strange in [0x400, 0x10_0000, 1 << 40] {
            let error = Flags::parse(strange | COMPRESSION_ZSTD, 0).err().unwrap();
            let expected =
                format!("superblock flags {strange:#x} of the image can be read by tools newer than nydus v2.4.4 only");
            assert_eq!(error.to_string(), expected);
        }
        for bad in [COMPRESSION_NONE | COMPRESSION_ZSTD, HASH_BLAKE3 | HASH_SHA256] {
            assert!(matches!(Flags::parse(bad, 0), Err(RafsError::Malformed { .. })), "{bad:#x}");
        }
        let old = Flags::parse(0, 0).unwrap();
        assert_eq!((old.compressor, old.digester), (Compressor::Lz4Block, Digester::Blake3));
        let reserved = Flags::parse(0x8500_0000 | COMPRESSION_ZSTD | HASH_SHA256 | EXPLICIT_UID_GID, 0).unwrap();
        assert!(reserved.has_owner_ids && !reserved.has_xattrs);
        assert!(Flags::parse(TARFS_MODE, 0).unwrap().is_tarfs && !reserved.is_tarfs);
    }

    #[test]
    fn features_unknown_and_contradictory_are_refused() {
        const V2: u32 = feature::CHUNK_INFO_V2;
        let separate_zran = feature::SEPARATE | feature::ZRAN | V2;
        let error = features(0x3001, "some", 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "blob features 0x3000 of blob some can be read by tools newer than nydus v2.4.4 only"
        );
        for bad in [
            feature::BATCH,
            feature::ENCRYPTED,
            separate_zran & !V2,
            separate_zran & !feature::SEPARATE,
            separate_zran | feature::BATCH,
            feature::SEPARATE | feature::ENCRYPTED | V2,
            feature::ALIGNED | feature::TARFS,
            feature::TARFS | feature::BATCH | V2,
        ] {
            assert!(matches!(features(bad, "id", 0), Err(RafsError::Malformed { .. })), "{bad:#x}");
        }
        for good in
            [separate_zran, feature::SEPARATE, feature::BATCH | feature::ENCRYPTED | V2, 0x600 | feature::EXTERNAL]
        {
            assert_eq!(features(good | feature::ALIGNED, "id", 0).unwrap(), good | feature::ALIGNED);
        }
        assert_eq!(features(0x0100_0001, "id", 0).unwrap(), feature::ALIGNED);
    }

    #[test]
    fn features_of_v5_are_kept_as_far_as_they_are_known() {
        assert_eq!(v5_features(0x1001, "id").unwrap(), feature::ALIGNED);
        assert_eq!(v5_features(feature::EXTERNAL, "id").unwrap(), feature::EXTERNAL);
        for (bit, name) in [(feature::BATCH, "BATCH"), (feature::ZRAN, "ZRAN"), (feature::ENCRYPTED, "ENCRYPTED")] {
            let error = v5_features(bit | feature::CHUNK_INFO_V2, "id").unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("RAFS v5 blob id"), "{error}");
        }
    }
}
