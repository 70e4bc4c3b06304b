//! READDIR and READDIRPLUS of an image.

use std::time::Duration;

use rustix::io::Errno;

use super::ImageFs;
use crate::fs::ids::NodeIds;
use crate::fuse::reply::Added;
use crate::fuse::reply::Attr;
use crate::fuse::reply::DirWriter;
use crate::fuse::reply::Entry;
use crate::fuse::reply::Reply;
use crate::fuse::slot::ReplySlot;
use crate::rafs::entries::DirEntry;

impl ImageFs {
    pub(super) fn readdir<S: ReplySlot>(&self, dir: u32, from: u64, size: u32, reply: Reply<S>) {
        reply.directory(size, |writer| {
            self.list(dir, from, |entry| {
                writer.plain(self.shown_ino(dir, &entry), entry.next, entry.kind.into(), entry.name)
            })
        });
    }

    pub(super) fn readdirplus<S: ReplySlot>(&self, ids: NodeIds, dir: u32, from: u64, size: u32, reply: Reply<S>) {
        reply.directory(size, |writer| self.list(dir, from, |entry| self.add_plus(ids, dir, &entry, writer)));
    }

    fn add_plus(&self, ids: NodeIds, dir: u32, entry: &DirEntry<'_>, writer: &mut DirWriter<'_>) -> Added {
        if !matches!(entry.name, b"." | b"..")
            && let Ok(inode) = self.inode(entry.ino)
        {
            return writer.plus(&self.entry(ids, &inode), entry.next, entry.name);
        }
        // `.` and `..` make no inode. Neither does a damaged one, which must not hide the names behind it: whoever
        // wants it meets the error at LOOKUP.
        let bare = Entry {
            node: 0,
            generation: 0,
            entry_valid: Duration::ZERO,
            attr_valid: Duration::ZERO,
            attr: Attr { ino: self.shown_ino(dir, entry), mode: u32::from(entry.kind) << 12, ..Attr::default() },
        };
        writer.plus(&bare, entry.next, entry.name)
    }

    /// Hands the entries from position `from` on to `add`, until it takes no more.
    fn list(&self, dir: u32, from: u64, mut add: impl FnMut(DirEntry<'_>) -> Added) -> Result<(), Errno> {
        let dir = self.inode(dir)?;
        let mut entries = self.told(self.image.entries(&dir, from))?;
        while let Some(entry) = entries.next() {
            if add(self.told(entry)?) == Added::Full {
                break;
            }
        }
        Ok(())
    }

    /// `d_ino` of an entry, which is the `st_ino` of what it names. Above the root is the root.
    fn shown_ino(&self, dir: u32, entry: &DirEntry<'_>) -> u64 {
        if entry.name == b".." && dir == self.root() { dir.into() } else { entry.ino.into() }
    }
}
