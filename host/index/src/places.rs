//! A worker's engine hashes, and the place in the index of each.
//!
//! An open-addressing table of 16 bytes an entry. Entries lie in the order of their spread hashes, so that a miss ends early,
//! growing is one streaming copy, and a table may have any size: it grows by a quarter and stays 68 to 85 % full.

/// Where a block lies in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) run: u32,
    pub(crate) offset: u16,
}

#[derive(Clone, Copy)]
struct Entry {
    key: u64,
    place: Place,
}

/// No entry: runs are numbered from 0, and there are never so many.
const EMPTY: Entry = Entry { key: 0, place: Place { run: u32::MAX, offset: 0 } };

#[derive(Default)]
pub(crate) struct Places {
    /// The last entry is always empty: probing needs no wrapping around, only a tail beyond the last home.
    entries: Box<[Entry]>,
    homes: u64,
    len: usize,
}

/// Entries beyond the last home, for those that are displaced from it.
const TAIL: usize = 64;

impl Places {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.entries)
    }

    pub(crate) fn get(&self, key: u64) -> Option<Place> {
        let at = self.find(key).ok()?;
        Some(self.entries[at].place)
    }

    /// Reads where the keys would lie, so that what follows finds them in the processor's cache: the reads overlap.
    pub(crate) fn warm(&self, keys: impl Iterator<Item = u64>) {
        if self.homes > 0 {
            let sum = keys.fold(0, |sum: u64, key| sum ^ self.entries[self.home(key)].key);
            std::hint::black_box(sum);
        }
    }

    /// Makes room for so many more.
    pub(crate) fn reserve(&mut self, more: usize) {
        let needed = self.len + more;
        if needed * 100 > self.homes as usize * 85 {
            let homes = (needed * 100 / 85).max(self.homes as usize * 5 / 4) + 8;
            self.resize(homes);
        }
    }

    /// The place that the key had before.
    pub(crate) fn insert(&mut self, key: u64, place: Place) -> Option<Place> {
        let at = match self.find(key) {
            Ok(at) => return Some(std::mem::replace(&mut self.entries[at].place, place)),
            Err(at) => at,
        };
        let free = (at..self.entries.len()).find(|&at| self.entries[at].is_empty());
        // Room is left behind the last entry, always.
        let Some(free) = free.filter(|&free| free + 1 < self.entries.len()) else {
            self.resize(self.homes as usize * 5 / 4 + 8);
            return self.insert(key, place);
        };
        self.entries.copy_within(at..free, at + 1);
        self.entries[at] = Entry { key, place };
        self.len += 1;
        None
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<Place> {
        let at = self.find(key).ok()?;
        let place = self.entries[at].place;
        // Those behind move back, up to the first that lies at its home.
        let mut end = at + 1;
        while !self.entries[end].is_empty() && self.home(self.entries[end].key) < end {
            end += 1;
        }
        self.entries.copy_within(at + 1..end, at);
        self.entries[end - 1] = EMPTY;
        self.len -= 1;
        Some(place)
    }

    /// Gives memory back when little of it is used.
    pub(crate) fn shrink(&mut self) {
        if self.len == 0 {
            *self = Self::default();
        } else if self.homes > 64 && self.len * 100 < self.homes as usize * 40 {
            self.resize(self.len * 100 / 70 + 8);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Place)> {
        self.entries.iter().filter(|entry| !entry.is_empty()).map(|entry| (entry.key, entry.place))
    }

    /// Where the key lies, or where it would be put.
    fn find(&self, key: u64) -> Result<usize, usize> {
        if self.homes == 0 {
            return Err(0);
        }
        let spread = spread(key);
        let mut at = self.home(key);
        loop {
            let entry = &self.entries[at];
            if entry.is_empty() {
                return Err(at);
            }
            if entry.key == key {
                return Ok(at);
            }
            if self::spread(entry.key) > spread {
                return Err(at);
            }
            at += 1;
        }
    }

    fn home(&self, key: u64) -> usize {
        ((u128::from(spread(key)) * u128::from(self.homes)) >> 64) as usize
    }

    fn resize(&mut self, homes: usize) {
        let old = std::mem::take(&mut self.entries);
        self.homes = homes as u64;
        let mut entries = vec![EMPTY; homes + TAIL].into_boxed_slice();
        let mut next = 0;
        for entry in old.iter().filter(|entry| !entry.is_empty()) {
            next = self.home(entry.key).max(next);
            if next + 1 >= entries.len() {
                // So many at the end of the table: more homes spread them.
                self.entries = old;
                return self.resize(homes * 5 / 4 + TAIL);
            }
            entries[next] = *entry;
            next += 1;
        }
        self.entries = entries;
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.place.run == u32::MAX
    }
}

/// Spreads engines' hashes, of which nothing is known, over all 64 bits; each has its own.
fn spread(key: u64) -> u64 {
    let key = (key ^ (key >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key ^ (key >> 29)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map(operations in proptest::collection::vec((0..3_u8, 0..300_u64), 0..2_000), stride in 1..u64::MAX) {
            let (mut places, mut model) = (Places::default(), HashMap::new());
            for (nth, (what, key)) in operations.into_iter().enumerate() {
                let key = key.wrapping_mul(stride);
                let place = Place { run: nth as u32, offset: 1 };
                match what {
                    0 | 1 => {
                        places.reserve(usize::from(what));
                        prop_assert_eq!(places.insert(key, place), model.insert(key, place));
                    }
                    _ => {
                        prop_assert_eq!(places.remove(key), model.remove(&key));
                        places.shrink();
                    }
                }
                prop_assert_eq!(places.len(), model.len());
            }
            for key in (0..300_u64).map(|key| key.wrapping_mul(stride)) {
                prop_assert_eq!(places.get(key), model.get(&key).copied());
            }
            prop_assert_eq!(places.iter().collect::<HashMap<_, _>>(), model);
        }
    }

    #[test]
    fn an_entry_costs_at_most_24_bytes_and_an_empty_table_none() {
        let mut places = Places::default();
        for key in 0..100_000 {
            places.reserve(1);
            places.insert(key, Place { run: 1, offset: 0 });
            assert!(key < 2_000 || places.bytes() <= 24 * places.len(), "{} bytes for {} entries", places.bytes(), places.len());
        }
        for key in 0..100_000 {
            places.remove(key);
            places.shrink();
        }
        assert_eq!((places.len(), places.bytes()), (0, 0));
    }
}
