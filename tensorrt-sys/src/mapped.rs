//! Read-only maps of files: weights go to TensorRT from the page cache, without a copy in this process's memory.
use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps a whole file. A file that shrinks while it is mapped kills the process on the next access, so only a build
    /// child maps, and only files that its parent holds still.
    ///
    /// # Errors
    /// A file that cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<MappedFile> {
        let fail = |source| Error::Map { path: path.into(), source };
        let file = File::open(path).map_err(fail)?;
        // SAFETY: nothing in this process writes to the file, see above for others.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?;
        Ok(MappedFile { map })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
