//! The steps of a fill: the moments between two changes of the files in a cache directory.
//!
//! Each of them calls `pass`, which does nothing. With the feature `testing` somebody can watch: a test ends the process at
//! the N-th step, for every N, and looks at what is left.

/// Makes the kinds of steps, and the list of all of them, from one list.
macro_rules! steps {
    ($($(#[$about:meta])* $step:ident,)*) => {
        /// What has just been done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Step {
            $($(#[$about])* $step,)*
        }

        impl Step {
            /// All kinds of steps.
            #[cfg(feature = "testing")]
            pub const ALL: &[Self] = &[$(Self::$step,)*];
        }
    };
}

steps! {
    /// The side file is there, perhaps empty, and locked for the setup.
    SideMade,
    /// The data file is there, perhaps empty.
    DataMade,
    /// A data file that is no good lost its name.
    DataRemoved,
    /// The data file has its length.
    DataSized,
    /// The chunk map is there, perhaps empty.
    MapMade,
    /// It has its length.
    MapSized,
    /// It has its header.
    MapReady,
    /// The side file has its length, and trusts nothing.
    SideSized,
    /// The first opener of a boot has taken back what was not flushed in the last one.
    SideReduced,
    /// The side file has its header.
    SideReady,
    /// A chunk table has a file under a name of our own.
    TableMade,
    /// It is written.
    TableWritten,
    /// It has its name.
    TableNamed,
    /// A chunk was fetched and verified, and is about to be written.
    ChunkVerified,
    /// Its place is ours.
    ChunkClaimed,
    /// It is written.
    ChunkWritten,
    /// The chunk map says that it is there.
    ChunkMapped,
    /// The side file says that it is right.
    ChunkTrusted,
    /// This process knows where it lies.
    ChunkNoted,
    /// A chunk in the cache was found wrong, and is not trusted any more.
    ChunkRefuted,
    /// A flush knows what it speaks of.
    FlushBegun,
    /// The data is on the disk.
    Flushed,
    /// The side file says so.
    FlushNoted,
}

/// `step` was done.
#[cfg(not(feature = "testing"))]
#[inline]
pub(super) fn pass(_step: Step) {}

/// `step` was done.
#[cfg(feature = "testing")]
#[inline]
pub(super) fn pass(step: Step) {
    if let Some(watch) = WATCH.get() {
        watch(step);
    }
}

#[cfg(feature = "testing")]
static WATCH: std::sync::OnceLock<fn(Step)> = std::sync::OnceLock::new();

/// From now on `watcher` is called after each step, on the thread that did it. The first one stays.
#[cfg(feature = "testing")]
pub fn watch(watcher: fn(Step)) {
    let _ = WATCH.set(watcher);
}
