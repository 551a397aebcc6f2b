"""`python -m titans_mcore.native` compiles the native memory where that was never done, and says what came of it."""

from .build import library_file, why_not_built

if __name__ == "__main__":
    reason = why_not_built()
    print(f"memory: computes in torch operations, which is slower; {reason}" if reason else f"memory: {library_file()}")
