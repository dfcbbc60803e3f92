"""vLLM engines in processes of their own and what runs inside of them; the only modules here that import vLLM."""
