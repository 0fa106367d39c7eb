//! Memory for blocks that come and go, used again.
//!
//! New memory is dear: the system gives it page by page, zeroed, which takes longer than to read a file from the system's cache.

use std::mem::take;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a buffer begins, in bytes: where the elements of any tensor may begin.
pub(super) const ALIGNMENT: usize = 64;

/// Buffers that nobody uses; a copy is the same.
#[derive(Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Idle>>);

#[derive(Default)]
struct Idle {
    memory: Vec<Vec<u8>>,
    /// Whether those that come back are kept.
    is_kept: bool,
}

impl Buffers {
    /// A buffer of `len` bytes, whatever is in them; none where memory is short. Of idle ones of another size the memory is given
    /// back.
    pub(super) fn take(&self, len: usize) -> Option<Buffer> {
        let needed = len + ALIGNMENT;
        let mut idle = take(&mut self.lock().memory);
        let fits = |memory: &Vec<u8>| (needed..=needed + needed / 4).contains(&memory.len());
        let memory = match idle.iter().position(fits) {
            Some(index) => idle.swap_remove(index),
            None => {
                drop(idle);
                let mut memory = Vec::new();
                memory.try_reserve_exact(needed).ok()?;
                memory.resize(needed, 0);
                memory
            }
        };
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Some(Buffer {
            memory,
            start,
            len,
            home: self.clone(),
        })
    }

    /// Whether buffers that come back are kept from now on; if not, nothing idle is either.
    pub(super) fn keep(&self, is_kept: bool) {
        let mut idle = self.lock();
        idle.is_kept = is_kept;
        if !is_kept {
            idle.memory.clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are given back when they are dropped.
pub(super) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    home: Buffers,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = self.home.lock();
        if idle.is_kept {
            idle.memory.push(take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_where_its_size_is_about_right() {
        let buffers = Buffers::default();
        let take = |len| buffers.take(len).expect("memory");
        let place = |buffer: &Buffer| buffer.as_ref().as_ptr() as usize;
        buffers.keep(true);
        let first = take(1000);
        let (second, at) = (take(1000), place(&first));
        assert_eq!((at % ALIGNMENT, first.as_ref().len()), (0, 1000));
        assert_ne!(place(&second), at);
        drop(first);
        assert_eq!(place(&take(900)), at);
        take(100);
        assert_eq!(buffers.lock().memory[0].len(), 100 + ALIGNMENT);
        buffers.keep(false);
        drop(second);
        assert!(buffers.lock().memory.is_empty());
    }
}
