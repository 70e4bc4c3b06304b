//! What the walk over the tree does not meet: tables, later records of hard links, and parts that overlap.

use super::Finding;
use super::Part;
use super::extents::Owner;
use super::walk::Steps;
use super::walk::Walk;
use crate::rafs::image::Format;
use crate::rafs::malformed;

impl Walk<'_> {
    /// The bytes of superblock and tables are theirs.
    pub(super) fn claim_tables(&mut self) -> Steps {
        let tables = match &self.image.format {
            Format::V5(image) => image.tables(),
            Format::V6(image) => image.tables(),
        };
        let tables = match tables {
            Ok(tables) => tables,
            Err(fault) => return self.found(None, fault),
        };
        for (name, range) in tables {
            let number = u32::try_from(self.parts.len()).unwrap_or(u32::MAX);
            self.parts.push(name);
            self.claim(&range, Owner { ino: 0, directory: number })?;
        }
        Ok(())
    }

    /// Looks at the later records of hard links in v5, which nothing else reads: they must repeat the first one.
    pub(super) fn links(&mut self) -> Steps {
        let image = self.image;
        let Format::V5(v5) = &image.format else { return Ok(()) };
        for index in 1..=v5.entries {
            let link = match v5.later_link(index) {
                Ok(Some(link)) => link,
                Ok(None) => continue,
                Err(fault) => {
                    // Mostly this was told already, when its name was met.
                    if self.report.findings.is_empty() {
                        let path = v5.name_of(index).ok().and_then(|(parent, name)| self.path_in(parent, &name));
                        self.found(path, fault)?;
                    }
                    continue;
                }
            };
            let Ok((parent, name)) = v5.name_of(index) else { continue };
            let directory = self.numbers.get(&parent).copied().unwrap_or_default();
            let path = self.path_in(parent, &name);
            let outcome = match v5.link_extent(&link) {
                Ok(extent) => {
                    self.claim(&extent, Owner { ino: link.first, directory })?;
                    v5.compare_link(&link)
                }
                Err(fault) => Err(fault),
            };
            if let Err(fault) = outcome {
                self.found(path, fault)?;
            }
        }
        Ok(())
    }

    /// The path of a name in the directory with the inode `ino`, if that was met.
    fn path_in(&self, ino: u32, name: &[u8]) -> Option<Vec<u8>> {
        self.numbers.get(&ino).map(|&directory| self.path(directory, name))
    }

    /// Tells all parts that share bytes with another.
    pub(super) fn overlaps(&mut self) -> Steps {
        for (offset, owner, other) in self.extents.overlaps() {
            let reason = format!("{} overlaps {}", self.shown(owner), self.shown(other));
            let path = (owner.ino != 0).then(|| self.path_of(owner));
            let field = if owner.ino == 0 { "table" } else { "inode" };
            self.found(path, malformed(field, offset, reason))?;
        }
        Ok(())
    }

    fn shown(&self, owner: Owner) -> String {
        let table = self.parts.get(usize::try_from(owner.directory).unwrap_or(usize::MAX));
        match (owner.ino, table) {
            (0, Some(name)) => format!("the {name}"),
            (ino, _) => format!("inode {ino}"),
        }
    }

    fn path_of(&self, owner: Owner) -> Vec<u8> {
        // The root has no name above.
        let name = match self.directory_at(0) {
            Some(root) if root.ino == owner.ino => Vec::new(),
            _ => self.name_in(owner.directory, owner.ino),
        };
        self.path(owner.directory, &name)
    }

    /// Gives findings without a path that of the inode in which their offset lies.
    pub(super) fn name_findings(&mut self) {
        let mut findings = std::mem::take(&mut self.report.findings);
        for finding in &mut findings {
            if let Finding { part: Part::Metadata, path: path @ None, fault } = finding
                && let crate::rafs::RafsError::Malformed { offset, .. } = fault
                && let Some(owner) = self.extents.owner_of(*offset).filter(|owner| owner.ino != 0)
            {
                *path = Some(self.path_of(owner));
            }
        }
        self.report.findings = findings;
    }
}
