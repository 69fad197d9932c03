//! Reading whole files that are meant to be small: what is not, is refused by its size, before it fills
//! the memory. Pipes are files as well (`--config <(…)`), so it is what comes that counts.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// All of a file's bytes.
///
/// # Errors
/// What the file system says, or that it has more than `bytes_max`.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path)?;
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let text =
            format!("it has more than {bytes_max} bytes, so it is not the file that is meant");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// The same as text.
///
/// # Errors
/// As [`read`], or that it is not UTF-8.
pub fn read_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(read(path, bytes_max)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound_and_one_without_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "12345");
        for (path, bytes_max) in [(&*path, 4), (Path::new("/dev/zero"), 1 << 20)] {
            let error = read(path, bytes_max).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("more than {bytes_max} bytes"))
            );
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert!(read_text(&path, 5).is_err());
    }
}
