"""Where text comes from: files, folders and object stores, their forms, the records in them, and how they are split."""
