//! A copy of a machine's RAM that is kept up to date by dirty sets alone.

use vmm::{DirtySet, GuestRam, PAGE_SIZE, PageNo};

/// The copy.
pub struct Shadow {
    pages: Vec<(PageNo, Box<[u8; PAGE_SIZE]>)>,
}

impl Shadow {
    /// All zeroes: what RAM is before anything was loaded.
    #[must_use]
    pub fn zeroed(ram: &GuestRam) -> Self {
        Self { pages: ram.pages().map(|page| (page, Box::new([0; PAGE_SIZE]))).collect() }
    }

    /// Copies the pages of one interval. Returns how many of them were as before.
    ///
    /// # Panics
    /// When the set names a page that is not RAM.
    pub fn apply(&mut self, dirty: &DirtySet, ram: &GuestRam) -> u64 {
        let mut same = 0;
        for page in dirty.iter() {
            let at = self.pages.binary_search_by_key(&page, |(p, _)| *p).expect("a dirty page is RAM");
            let before = self.pages[at].1.clone();
            ram.copy_out(page, &mut self.pages[at].1).expect("a dirty page is RAM");
            same += u64::from(before == self.pages[at].1);
        }
        same
    }

    /// Copies everything.
    ///
    /// # Panics
    /// Never: its pages are those of the RAM.
    pub fn copy_all(&mut self, ram: &GuestRam) {
        for (page, bytes) in &mut self.pages {
            ram.copy_out(*page, bytes).expect("a page of this RAM");
        }
    }

    /// Writes everything into the RAM of another machine.
    ///
    /// # Panics
    /// When that machine is of another size.
    pub fn write_to(&self, ram: &GuestRam) {
        for (page, bytes) in &self.pages {
            ram.copy_in(*page, bytes).expect("machines of equal size");
        }
    }

    /// The pages in which RAM and copy differ.
    ///
    /// # Panics
    /// Never: its pages are those of the RAM.
    #[must_use]
    pub fn differing(&self, ram: &GuestRam) -> Vec<PageNo> {
        let mut now = [0; PAGE_SIZE];
        let differs = |(page, bytes): &&(PageNo, Box<[u8; PAGE_SIZE]>)| {
            ram.copy_out(*page, &mut now).expect("a page of this RAM");
            now != **bytes
        };
        self.pages.iter().filter(differs).map(|(page, _)| *page).collect()
    }
}
