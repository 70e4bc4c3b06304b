//! What `--version` prints, and what the management API will say of the version.

/// The five facts of a build, each with its name as clients look for it. What the build did not record is "unknown".
pub fn lines() -> [(&'static str, &'static str); 5] {
    [
        ("Version", concat!("v", env!("CARGO_PKG_VERSION"))),
        ("Git Commit", env!("NYDUS_GIT_COMMIT")),
        ("Build Time", env!("NYDUS_BUILD_TIME")),
        ("Profile", env!("NYDUS_PROFILE")),
        ("Rustc", env!("NYDUS_RUSTC")),
    ]
}
