//! The memory of children, each by itself and together.
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that children have for themselves, without the files that they map.
#[derive(Debug, Default)]
pub struct Memory {
    now: AtomicU64,
    most: AtomicU64,
}

impl Memory {
    /// The most that there was at one time.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }

    /// A child's share, which is given back when it is dropped.
    pub(super) fn share(&self) -> Share<'_> {
        Share { memory: self, now: 0, most: 0 }
    }
}

pub(super) struct Share<'m> {
    memory: &'m Memory,
    now: u64,
    most: u64,
}

impl Share<'_> {
    pub(super) fn most(&self) -> u64 {
        self.most
    }

    pub(super) fn is_now(&mut self, bytes: u64) {
        let others = self.memory.now.fetch_sub(self.now, Ordering::Relaxed) - self.now;
        self.memory.now.fetch_add(bytes, Ordering::Relaxed);
        self.memory.most.fetch_max(others + bytes, Ordering::Relaxed);
        self.now = bytes;
        self.most = self.most.max(bytes);
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.memory.now.fetch_sub(self.now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_at_one_time_is_kept() {
        let memory = Memory::default();
        let (mut one, mut two) = (memory.share(), memory.share());
        one.is_now(5);
        two.is_now(7);
        one.is_now(4);
        drop(two);
        one.is_now(10);
        assert_eq!((one.most(), memory.most()), (10, 12));
        drop(one);
        assert_eq!(memory.now.load(Ordering::Relaxed), 0);
    }
}
