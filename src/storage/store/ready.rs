//! A read whose bytes are at hand.

use arc_swap::Guard;
use smallvec::SmallVec;

use super::decoded::Chunk;
use crate::rafs::facts::Piece;
use crate::storage::cache::Generation;
use crate::storage::sync::Arc;
use crate::sys::sink::Sink;
use crate::sys::sink::SinkError;

/// Where a run of bytes is.
enum Part {
    /// In the data file of a blob.
    Cache { files: Guard<Arc<Generation>>, blob: u32, offset: u64, len: usize },
    /// In a chunk that is in memory only.
    Memory { chunk: Arc<Vec<u8>>, start: usize, len: usize },
}

/// Parts without an allocation: what a read in one chunk, or across one border, needs. Each makes every move of a
/// [`ReadyRead`] longer, and more of them are only needed for reads that copy much more.
const INLINE_PARTS: usize = 2;

/// Verified bytes, ready to be copied out. Keeps them alive; holds no lock.
pub struct ReadyRead {
    parts: SmallVec<[Part; INLINE_PARTS]>,
    len: usize,
}

impl std::fmt::Debug for ReadyRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadyRead").field("len", &self.len).field("parts", &self.parts.len()).finish()
    }
}

impl ReadyRead {
    pub(super) fn new() -> Self {
        Self { parts: SmallVec::new(), len: 0 }
    }

    /// The files of the last part, if `piece` lies in them directly behind it.
    #[inline]
    pub(super) fn files_before(&self, piece: &Piece) -> Option<&Generation> {
        match self.parts.last()? {
            Part::Cache { files, blob, offset, len }
                if *blob == piece.blob && offset.checked_add(*len as u64) == Some(piece.offset) =>
            {
                Some(files)
            }
            _ => None,
        }
    }

    /// Takes `piece` into the last part, to which [`Self::files_before`] said that it belongs.
    #[inline]
    pub(super) fn extend(&mut self, piece: &Piece) {
        if let Some(Part::Cache { len, .. }) = self.parts.last_mut() {
            *len = len.saturating_add(piece.len as usize);
            self.len = self.len.saturating_add(piece.len as usize);
        }
    }

    /// Appends a piece that lies in the data file of `files`.
    #[inline]
    pub(super) fn push_cached(&mut self, piece: &Piece, files: Guard<Arc<Generation>>) {
        let len = piece.len as usize;
        self.len = self.len.saturating_add(len);
        self.parts.push(Part::Cache { files, blob: piece.blob, offset: piece.offset, len });
    }

    /// Appends a piece of `chunk`. `None`: it does not lie in it.
    pub(super) fn push_chunk(&mut self, chunk: &Chunk, piece: &Piece) -> Option<()> {
        let start = usize::try_from(piece.offset.checked_sub(chunk.offset)?).ok()?;
        let len = piece.len as usize;
        chunk.plain.len().checked_sub(start).filter(|room| *room >= len)?;
        self.len = self.len.saturating_add(len);
        self.parts.push(Part::Memory { chunk: Arc::clone(&chunk.plain), start, len });
        Some(())
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies all bytes, in order, into `sink`. May wait for a page of the data file, never for a backend.
    ///
    /// # Errors
    /// [`SinkError::Source`] when the data file was truncated or its disk failed: the sink then holds undefined bytes,
    /// and the next read of them fetches anew. What the sink says otherwise.
    #[inline]
    pub fn copy_into(&self, sink: &mut dyn Sink) -> Result<(), SinkError> {
        for part in &self.parts {
            match part {
                Part::Cache { files, offset, len, .. } => sink.put_view(&files.view, *offset, *len)?,
                Part::Memory { chunk, start, len } => {
                    let bytes = chunk.get(*start..start.saturating_add(*len)).unwrap_or_default();
                    sink.put_bytes(bytes)?;
                }
            }
        }
        Ok(())
    }
}
