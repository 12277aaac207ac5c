//! Files with a JSON value on each line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::DataError;

/// The values of a file, one in memory at a time.
pub(super) struct JsonLines {
    path: PathBuf,
    reader: BufReader<File>,
    line: u64,
}

impl JsonLines {
    pub fn open(path: PathBuf) -> Result<Self, DataError> {
        let file = File::open(&path).map_err(DataError::read(&path))?;
        Ok(Self { path, reader: BufReader::new(file), line: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next value with the number of its line, from 1; empty lines are passed over.
    pub fn next(&mut self) -> Result<Option<(u64, Value)>, DataError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.line += 1;
            if self.reader.read_until(b'\n', &mut bytes).map_err(DataError::read(&self.path))? == 0 {
                return Ok(None);
            }
            if !bytes.trim_ascii().is_empty() {
                break;
            }
        }
        let value = serde_json::from_slice(&bytes).map_err(|error| DataError::Json {
            path: self.path.clone(),
            line: self.line,
            message: error.to_string(),
        })?;
        Ok(Some((self.line, value)))
    }
}
