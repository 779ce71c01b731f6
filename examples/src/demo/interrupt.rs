//! Ctrl-C and its like: nothing stays behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use super::error::DemoError;

/// What happens on a signal. The pair's processes and namespaces go with this process whatever ends it; the files are removed here.
pub(super) struct Interrupt {
    files: TempDir,
    waiting: Arc<AtomicBool>,
    signalled: mpsc::Receiver<()>,
}

impl Interrupt {
    /// Makes the directory for all runs' files, and removes it on SIGINT, SIGTERM and SIGHUP.
    pub(super) fn install() -> Result<Self, DemoError> {
        let host = |what: &'static str| move |e| DemoError::Host(format!("{what}: {e}"));
        let files = tempfile::Builder::new()
            .prefix("ft-demo-")
            .tempdir()
            .map_err(host("cannot make a directory for temporary files"))?;
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(host("cannot handle signals"))?;
        let waiting = Arc::new(AtomicBool::new(false));
        let (tell, signalled) = mpsc::channel();
        let doomed: PathBuf = files.path().to_path_buf();
        let somebody_waits = Arc::clone(&waiting);
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in &mut signals {
                    if somebody_waits.load(Ordering::Acquire) && tell.send(()).is_ok() {
                        continue;
                    }
                    // Best effort: what a dying process holds open vanishes with it.
                    let _partly = fs::remove_dir_all(&doomed);
                    process::exit(128 + signal);
                }
            })
            .map_err(host("cannot start a thread"))?;
        Ok(Self { files, waiting, signalled })
    }

    /// Where files of the runs go.
    pub(super) fn files(&self) -> &Path {
        self.files.path()
    }

    /// Keeps the files after the end of the program.
    pub(super) fn keep_files(&self) -> String {
        // The directory's own guard cannot be told through a shared reference; moving what is in it out of reach can.
        let kept = self.files.path().with_extension("kept");
        match fs::rename(self.files.path(), &kept) {
            Ok(()) => kept.display().to_string(),
            Err(e) => format!("(not kept: {e})"),
        }
    }

    /// Waits for a signal.
    pub(super) fn wait(&self) {
        self.waiting.store(true, Ordering::Release);
        // The sender lives as long as the process.
        let _signalled = self.signalled.recv();
        self.waiting.store(false, Ordering::Release);
    }
}
